// ppft-worker: offers this host's devices to a coordinator and runs trainers on them.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "common/metrics/metrics.h"
#include "worker/agent/agent.h"
#include "worker/agent/devices.h"
#include "worker/agent/host_facts.h"
#include "worker/agent/offer.h"

namespace {

// How often a host without usable devices is looked at again.
constexpr absl::Duration kLookAgain = absl::Minutes(1);

int Fail(const absl::Status& status) { return ppft::ReportFailure("ppft-worker", status); }

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "worker";
}

struct Flags {
  ppft::agent::AgentOptions options;
  std::string devices = "cpu:1";
  std::string metrics_listen = "127.0.0.1:0";
  std::string nccl_interface;
  bool deterministic = false;
  int threads_per_slot = 0;
  bool names_work_dir = false;
  ppft::net::TlsFiles tls;
};

// The exit code where the program ends here: after --help, or with a flag that makes no sense.
std::optional<int> ParseFlags(int argc, char** argv, Flags& flags) {
  flags.options.version = PPFT_VERSION;
  flags.options.coordinator = "127.0.0.1:7070";
  flags.options.work_directory = "ppft-worker-data";
  flags.options.trainer_binary = ppft::BesideThisBinary("ppft-trainer");
  double cache_gib = 100;
  CLI::App app("Offers this host's devices to a ppft coordinator and runs trainers on them.");
  app.add_option("--coordinator", flags.options.coordinator, "HOST:PORT of the coordinator")->capture_default_str();
  app.add_option("--devices", flags.devices, "cpu:N: N slots that share the host's cores; cuda:all or cuda:0,2: GPUs")->capture_default_str();
  app.add_option("--threads_per_slot", flags.threads_per_slot, "compute threads of a CPU slot; 0 = cores / slots")->capture_default_str();
  app.add_option("--name", flags.options.name, "stable name of this worker; default: the host's name, with --work_dir also a sign of that folder");
  const CLI::Option* const work_dir =
      app.add_option("--work_dir", flags.options.work_directory, "folder for cached files and running ranks")->capture_default_str();
  app.add_option("--address", flags.options.address,
                 "address where trainers of other hosts reach this host's; default: the local end of the route to the coordinator");
  app.add_option("--metrics_listen", flags.metrics_listen, "HOST:PORT of /metrics; port 0 = any")->capture_default_str();
  app.add_option("--tls_ca", flags.tls.ca, "PEM authority of the coordinator's certificate");
  app.add_option("--tls_cert", flags.tls.certificate, "PEM certificate to show to the coordinator");
  app.add_option("--tls_key", flags.tls.key, "PEM key of that certificate");
  app.add_option("--nccl_socket_ifname", flags.nccl_interface, "interface for NCCL between hosts; other NCCL_ variables come from this process's environment");
  app.add_flag("--deterministic", flags.deterministic, "GPUs take paths that give the same bits each time, a few percent slower");
  app.add_option("--trainer", flags.options.trainer_binary, "the ppft-trainer binary; default: beside this one");
  app.add_option("--cache_limit_gib", cache_gib, "the file cache drops its least recently used files beyond this")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.set_version_flag("--version", PPFT_VERSION);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  flags.options.cache_limit_bytes = static_cast<int64_t>(cache_gib * (1 << 30));
  flags.names_work_dir = work_dir->count() > 0;
  return std::nullopt;
}

}  // namespace

int main(int argc, char** argv) {
  ppft::SetLogComponent("worker");
  Flags flags;
  if (const std::optional<int> exit_code = ParseFlags(argc, argv, flags)) return *exit_code;
  ppft::agent::AgentOptions& options = flags.options;

  auto credentials = ppft::net::LoadCredentials(flags.tls, "--tls_");
  if (!credentials.ok()) return Fail(credentials.status());
  options.channel.credentials = *credentials;
  if (!ppft::PathExists(options.trainer_binary)) {
    return Fail(absl::InvalidArgumentError(absl::StrCat("there is no trainer at ", options.trainer_binary, ": give --trainer PATH")));
  }
  const auto look = [&] {
    auto found = ppft::agent::OfferHost(flags.devices, flags.threads_per_slot, options.trainer_binary);
    if (!found.ok()) return found;
    for (ppft::v1::Device& device : found->devices) device.set_deterministic(flags.deterministic && device.kind() == "cuda");
    return found;
  };
  absl::StatusOr<ppft::agent::HostOffer> offer = look();
  if (!offer.ok()) return Fail(offer.status());
  if (!flags.nccl_interface.empty()) options.trainer_environment.push_back("NCCL_SOCKET_IFNAME=" + flags.nccl_interface);
  if (flags.deterministic) {
    options.trainer_environment.push_back("PPFT_DETERMINISTIC=1");
    options.trainer_environment.push_back("CUBLAS_WORKSPACE_CONFIG=:4096:8");  // cuBLAS promises equal bits with it alone
  }
  if (options.address.empty()) {
    absl::StatusOr<std::string> address = ppft::agent::RouteAddress(options.coordinator);
    if (!address.ok()) return Fail(address.status());
    options.address = *std::move(address);
  }
  options.work_directory = std::filesystem::absolute(options.work_directory).string();
  if (options.name.empty()) options.name = flags.names_work_dir ? ppft::agent::NameOfFolder(HostName(), options.work_directory) : HostName();

  ppft::BlockStopSignals();  // ServeOffer waits for them
  ppft::metrics::WorkerMetrics metrics(options.version, options.name);
  auto http = ppft::metrics::HttpServer::Start(flags.metrics_listen, metrics.registry());
  if (!http.ok()) return Fail(http.status());
  options.metrics_address = ppft::agent::MetricsAddress((*http)->address(), options.address);
  options.host = ppft::agent::GatherHostFacts(options.address);
  const char* interface = std::getenv("NCCL_SOCKET_IFNAME");
  options.host.set_nccl_interface(!flags.nccl_interface.empty() ? flags.nccl_interface : interface == nullptr ? "" : interface);
  ppft::LogInfo(options.name, ": ", offer->devices.size(), " x ", offer->devices.empty() ? "no device" : offer->devices[0].name(), ", trainers at ",
                options.address, ", coordinator ", options.coordinator, ", metrics on ", (*http)->address());
  const absl::Status status = ppft::agent::ServeOffer(options, *std::move(offer), &metrics, kLookAgain, look);
  return status.ok() ? 0 : Fail(status);
}
