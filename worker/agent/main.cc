// ppft-worker: offers this host's devices to a coordinator and runs trainers on them.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/match.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/metrics/metrics.h"
#include "worker/agent/agent.h"
#include "worker/agent/devices.h"
#include "worker/agent/host_facts.h"
#include "worker/agent/offer.h"

namespace {

// How often a host without usable devices is looked at again.
constexpr absl::Duration kLookAgain = absl::Minutes(1);

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "ppft-worker: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? 2 : 1;
}

std::string BesideThisBinary(const std::string& name) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  return (error ? std::filesystem::path(name) : self.parent_path() / name).string();
}

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "worker";
}

}  // namespace

int main(int argc, char** argv) {
  ppft::SetLogComponent("worker");
  ppft::agent::AgentOptions options;
  options.version = PPFT_VERSION;
  options.coordinator = "127.0.0.1:7070";
  options.work_directory = "ppft-worker-data";
  options.trainer_binary = BesideThisBinary("ppft-trainer");
  std::string devices = "cpu:1";
  std::string metrics_listen = "127.0.0.1:0";
  std::string nccl_interface;
  bool deterministic = false;
  int threads_per_slot = 0;
  double cache_gib = 100;
  ppft::net::TlsFiles tls;
  CLI::App app("Offers this host's devices to a ppft coordinator and runs trainers on them.");
  app.add_option("--coordinator", options.coordinator, "HOST:PORT of the coordinator")->capture_default_str();
  app.add_option("--devices", devices, "cpu:N: N slots that share the host's cores; cuda:all or cuda:0,2: GPUs")->capture_default_str();
  app.add_option("--threads_per_slot", threads_per_slot, "compute threads of a CPU slot; 0 = cores / slots")->capture_default_str();
  app.add_option("--name", options.name, "stable name of this worker; default: the host's name, with --work_dir also a sign of that folder");
  const CLI::Option* const work_dir = app.add_option("--work_dir", options.work_directory, "folder for cached files and running ranks")->capture_default_str();
  app.add_option("--address", options.address,
                 "address where trainers of other hosts reach this host's; default: the local end of the route to the coordinator");
  app.add_option("--metrics_listen", metrics_listen, "HOST:PORT of /metrics; port 0 = any")->capture_default_str();
  app.add_option("--tls_ca", tls.ca, "PEM authority of the coordinator's certificate");
  app.add_option("--tls_cert", tls.certificate, "PEM certificate to show to the coordinator");
  app.add_option("--tls_key", tls.key, "PEM key of that certificate");
  app.add_option("--nccl_socket_ifname", nccl_interface, "interface for NCCL between hosts; other NCCL_ variables come from this process's environment");
  app.add_flag("--deterministic", deterministic, "GPUs take paths that give the same bits each time, a few percent slower");
  app.add_option("--trainer", options.trainer_binary, "the ppft-trainer binary; default: beside this one");
  app.add_option("--cache_limit_gib", cache_gib, "the file cache drops its least recently used files beyond this")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.set_version_flag("--version", PPFT_VERSION);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  options.cache_limit_bytes = static_cast<int64_t>(cache_gib * (1 << 30));
  auto credentials = ppft::net::LoadCredentials(tls, "--tls_");
  if (!credentials.ok()) return Fail(credentials.status());
  options.channel.credentials = *credentials;
  if (!ppft::PathExists(options.trainer_binary)) {
    return Fail(absl::InvalidArgumentError(absl::StrCat("there is no trainer at ", options.trainer_binary, ": give --trainer PATH")));
  }
  const auto look = [&] {
    auto found = ppft::agent::OfferHost(devices, threads_per_slot, options.trainer_binary);
    if (!found.ok()) return found;
    for (ppft::v1::Device& device : found->devices) device.set_deterministic(deterministic && device.kind() == "cuda");
    return found;
  };
  absl::StatusOr<ppft::agent::HostOffer> offer = look();
  if (!offer.ok()) return Fail(offer.status());
  if (!nccl_interface.empty()) options.trainer_environment.push_back("NCCL_SOCKET_IFNAME=" + nccl_interface);
  if (deterministic) {
    options.trainer_environment.push_back("PPFT_DETERMINISTIC=1");
    options.trainer_environment.push_back("CUBLAS_WORKSPACE_CONFIG=:4096:8");  // cuBLAS promises equal bits with it alone
  }
  if (options.address.empty()) {
    absl::StatusOr<std::string> address = ppft::agent::RouteAddress(options.coordinator);
    if (!address.ok()) return Fail(address.status());
    options.address = *std::move(address);
  }
  options.work_directory = std::filesystem::absolute(options.work_directory).string();
  if (options.name.empty()) options.name = work_dir->count() > 0 ? ppft::agent::NameOfFolder(HostName(), options.work_directory) : HostName();

  // Blocked before any thread starts; ServeOffer waits for them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  ppft::metrics::WorkerMetrics metrics(options.version, options.name);
  auto http = ppft::metrics::HttpServer::Start(metrics_listen, metrics.registry());
  if (!http.ok()) return Fail(http.status());
  // Bound to every address: others reach it where they reach the trainers.
  const std::string& bound = (*http)->address();
  options.metrics_address = absl::StartsWith(bound, "0.0.0.0:") ? absl::StrCat(options.address, bound.substr(bound.rfind(':'))) : bound;
  options.host = ppft::agent::GatherHostFacts(options.address);
  const char* interface = std::getenv("NCCL_SOCKET_IFNAME");
  options.host.set_nccl_interface(!nccl_interface.empty() ? nccl_interface : interface == nullptr ? "" : interface);
  ppft::LogInfo(options.name, ": ", offer->devices.size(), " x ", offer->devices.empty() ? "no device" : offer->devices[0].name(), ", trainers at ",
                options.address, ", coordinator ", options.coordinator, ", metrics on ", (*http)->address());
  const absl::Status status = ppft::agent::ServeOffer(options, *std::move(offer), &metrics, kLookAgain, look);
  return status.ok() ? 0 : Fail(status);
}
