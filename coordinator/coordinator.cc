#include "coordinator/coordinator.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/address.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "common/net/channel.h"
#include "coordinator/job_planner.h"
#include "coordinator/service/call_gate.h"
#include "coordinator/store/sqlite_job_store.h"

namespace ppft::coordinator {
namespace {

constexpr std::chrono::milliseconds kCallGrace(500);  // for calls under way when the server stops
constexpr int64_t kMaxPemBytes = 1 << 20;

absl::StatusOr<Address> ParseListen(const std::string& listen) { return ParseAddress(listen, "--listen", /*least_port=*/0); }

// Why the address could not be bound, from the system itself.
std::string BindError(const Address& address) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (const int code = getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found); code != 0) return gai_strerror(code);
  Fd probe(socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  std::string error;
  if (bind(probe.get(), found->ai_addr, found->ai_addrlen) != 0) error = std::strerror(errno);
  freeaddrinfo(found);
  return error.empty() ? "the server could not start" : error;
}

// Prometheus's HTTP service discovery: where the workers' series are.
std::string ServiceDiscovery(const std::vector<v1::Worker>& workers) {
  nlohmann::json groups = nlohmann::json::array();
  for (const v1::Worker& worker : workers) {
    if (worker.state() != "ready" || worker.metrics_address().empty()) continue;
    groups.push_back({{"targets", {worker.metrics_address()}}, {"labels", {{"worker", worker.name()}}}});
  }
  return groups.dump();
}

// A root that is not there would make every registration fail later, with a sentence about something else.
absl::Status CheckRoots(const std::vector<std::string>& roots) {
  for (const std::string& root : roots) {
    std::error_code error;
    if (std::filesystem::is_directory(root, error)) continue;
    return absl::InvalidArgumentError(absl::StrCat("--model_root ", root, ": ", PathExists(root) ? "is not a folder" : "there is no such folder",
                                                   "; make it, or name the folder that holds your model folders"));
  }
  return absl::OkStatus();
}

// A store without the folder of its files: their disk is not mounted. To begin with an empty one would make all of them lost.
absl::Status CheckFilesFolder(const std::string& data_dir) {
  const std::string blobs = JoinPath(data_dir, "blobs/00");
  if (PathExists(blobs)) return absl::OkStatus();
  if (!PathExists(JoinPath(data_dir, "ppft.db"))) {
    MakeDirs(blobs).IgnoreError();  // before the store is there; what cannot be made is told by those who need it
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat("STORE_UNREADABLE: ", data_dir, "/ppft.db is there, but ", blobs,
                                                    " is not: mount the disk of the files; if they are lost for good, make that folder and start again"));
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> Credentials(const net::TlsFiles& tls) {
  if (tls.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  PPFT_ASSIGN_OR_RETURN(options.pem_root_certs, ReadFile(tls.ca, kMaxPemBytes));
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  PPFT_ASSIGN_OR_RETURN(pair.cert_chain, ReadFile(tls.certificate, kMaxPemBytes));
  PPFT_ASSIGN_OR_RETURN(pair.private_key, ReadFile(tls.key, kMaxPemBytes));
  options.pem_key_cert_pairs.push_back(std::move(pair));
  return grpc::SslServerCredentials(options);
}

}  // namespace

absl::Status CheckListen(const std::string& listen, const net::TlsFiles& tls) {
  PPFT_ASSIGN_OR_RETURN(const Address address, ParseListen(listen));
  if (!tls.empty() && !tls.complete()) return absl::InvalidArgumentError("--tls_cert, --tls_key and --tls_client_ca belong together: give all three or none");
  if (IsLoopback(address.host) || tls.complete()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("--listen ", listen,
                   " can be reached by other hosts, and nothing would protect it: give --tls_cert, --tls_key and --tls_client_ca, "
                   "or listen on 127.0.0.1 and let other hosts in through a tunnel"));
}

absl::StatusOr<std::unique_ptr<Coordinator>> Coordinator::Start(const CoordinatorOptions& options) {
  PPFT_RETURN_IF_ERROR(CheckListen(options.listen, options.tls));
  PPFT_RETURN_IF_ERROR(CheckRoots(options.model_roots));
  PPFT_RETURN_IF_ERROR(CheckRoles({"ppft.v1.JobService", "ppft.v1.ClusterService", "ppft.v1.WorkerService", "ppft.v1.BlobService", "ppft.v1.DatasetService",
                                   "ppft.v1.ModelService", "ppft.v1.ArtifactService"}));
  auto coordinator = std::unique_ptr<Coordinator>(new Coordinator());
  PPFT_RETURN_IF_ERROR(CheckFilesFolder(options.data_dir));
  // The store first: its lock keeps a second coordinator away from everything in data_dir.
  absl::StatusOr<std::unique_ptr<JobStore>> store = OpenSqliteJobStore(options.data_dir);
  if (absl::IsResourceExhausted(store.status()) && DiskGuard::RemoveBallast(options.data_dir)) store = OpenSqliteJobStore(options.data_dir);
  PPFT_RETURN_IF_ERROR(store.status());
  coordinator->metrics_ = std::make_unique<metrics::CoordinatorMetrics>(options.version);
  ArtifactsOptions artifacts;
  artifacts.data_dir = options.data_dir;
  artifacts.model_roots = options.model_roots;
  artifacts.prepare_binary = options.prepare_binary;
  artifacts.count_bytes = [metrics = coordinator->metrics_.get()](const char* direction, int64_t bytes) {
    metrics->AddArtifactBytes(direction, static_cast<double>(bytes));
  };
  PPFT_ASSIGN_OR_RETURN(coordinator->artifacts_, Artifacts::Open(artifacts));
  auto planner = std::make_shared<JobPlanner>();
  const auto plan = [planner](const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices, const std::string& kind) {
    return planner->Plan(record, model, devices, kind);
  };
  ControllerOptions controller = options.controller;
  controller.version = options.version;
  coordinator->controller_ =
      std::make_unique<JobController>(*std::move(store), coordinator->artifacts_->work(), coordinator->metrics_.get(), plan, std::move(controller));
  PPFT_RETURN_IF_ERROR(coordinator->controller_->Start());
  PPFT_RETURN_IF_ERROR(coordinator->Serve(options));
  return coordinator;
}

absl::Status Coordinator::Serve(const CoordinatorOptions& options) {
  JobController* const controller = controller_.get();
  PPFT_RETURN_IF_ERROR(artifacts_->Attach(controller, [controller](JobStore&, const std::string& id) -> absl::StatusOr<v1::Job> {
    PPFT_ASSIGN_OR_RETURN(const v1::Job* job, controller->FindJob(id));
    return *job;
  }));
  job_service_ = std::make_unique<JobServiceImpl>(
      controller,
      [this](const v1::ArtifactManifest& adapter, const v1::ModelRecord& model, const v1::AdapterSpec& spec) {
        return artifacts_->CheckInitAdapter(adapter, model, spec);
      },
      [this](const v1::ModelRecord& model) { return artifacts_->CheckModel(model); });
  cluster_service_ = std::make_unique<ClusterServiceImpl>(controller, options.version, options.data_dir,
                                                          [this](const std::vector<v1::ModelRecord>& models, const std::vector<v1::Dataset>& datasets,
                                                                 bool contents) { return artifacts_->CheckFiles(models, datasets, contents); });
  worker_service_ = std::make_unique<WorkerServiceImpl>(controller, artifacts_->worker_files());
  PPFT_ASSIGN_OR_RETURN(metrics_http_, metrics::HttpServer::Start(options.metrics_listen, metrics_->registry(), [controller] {
                          const auto workers =
                              controller->Run([controller](JobStore&) -> absl::StatusOr<std::vector<v1::Worker>> { return controller->Workers(); });
                          return ServiceDiscovery(workers.ok() ? *workers : std::vector<v1::Worker>());
                        }));

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  net::ApplyServerLimits(&builder);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error, never shared
  PPFT_ASSIGN_OR_RETURN(const Address address, ParseListen(options.listen));
  PPFT_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials, Credentials(options.tls));
  int port = 0;
  builder.AddListeningPort(options.listen, credentials, &port);
  builder.RegisterService(job_service_.get());
  builder.RegisterService(cluster_service_.get());
  builder.RegisterService(worker_service_.get());
  for (grpc::Service* service : artifacts_->services()) builder.RegisterService(service);
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> gates;
  gates.push_back(MakeCallGate(metrics_.get()));
  builder.experimental().SetInterceptorCreators(std::move(gates));
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options.listen, ": ", BindError(address), "; choose another --listen"));
  }
  address_ = FormatAddress(address.host, port);
  return absl::OkStatus();
}

Coordinator::~Coordinator() {
  if (server_ != nullptr) {
    server_->GetHealthCheckService()->SetServingStatus(false);
    server_->Shutdown(std::chrono::system_clock::now() + kCallGrace);
    server_->Wait();
    server_.reset();
  }
  if (artifacts_ != nullptr) artifacts_->Detach();
  if (controller_ != nullptr) controller_->Stop();
}

}  // namespace ppft::coordinator
