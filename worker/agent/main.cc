// ppft-worker: offers this host's devices to a coordinator and runs trainers on them.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <thread>

#include "absl/strings/match.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/metrics/metrics.h"
#include "worker/agent/agent.h"
#include "worker/agent/devices.h"

namespace {

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
  options.name = HostName();
  options.coordinator = "127.0.0.1:7070";
  options.work_directory = "ppft-worker-data";
  options.trainer_binary = BesideThisBinary("ppft-trainer");
  std::string devices = "cpu:1";
  std::string metrics_listen = "127.0.0.1:0";
  int threads_per_slot = 0;
  double cache_gib = 100;
  ppft::net::TlsFiles tls;
  CLI::App app("Offers this host's devices to a ppft coordinator and runs trainers on them.");
  app.add_option("--coordinator", options.coordinator, "HOST:PORT of the coordinator")->capture_default_str();
  app.add_option("--devices", devices, "cpu:N: N slots that share the host's cores")->capture_default_str();
  app.add_option("--threads_per_slot", threads_per_slot, "compute threads of a CPU slot; 0 = cores / slots")->capture_default_str();
  app.add_option("--name", options.name, "stable name of this worker")->capture_default_str();
  app.add_option("--work_dir", options.work_directory, "folder for cached files and running ranks")->capture_default_str();
  app.add_option("--address", options.address,
                 "address where trainers of other hosts reach this host's; default: the local end of the route to the coordinator");
  app.add_option("--metrics_listen", metrics_listen, "HOST:PORT of /metrics; port 0 = any")->capture_default_str();
  app.add_option("--tls_ca", tls.ca, "PEM authority of the coordinator's certificate");
  app.add_option("--tls_cert", tls.certificate, "PEM certificate to show to the coordinator");
  app.add_option("--tls_key", tls.key, "PEM key of that certificate");
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

  absl::StatusOr<std::vector<ppft::v1::Device>> offered = ppft::agent::OfferDevices(devices, threads_per_slot);
  if (!offered.ok()) return Fail(offered.status());
  options.devices = *std::move(offered);
  options.cache_limit_bytes = static_cast<int64_t>(cache_gib * (1 << 30));
  auto credentials = ppft::net::LoadCredentials(tls, "--tls_");
  if (!credentials.ok()) return Fail(credentials.status());
  options.channel.credentials = *credentials;
  if (!ppft::PathExists(options.trainer_binary)) {
    return Fail(absl::InvalidArgumentError(absl::StrCat("there is no trainer at ", options.trainer_binary, ": give --trainer PATH")));
  }
  if (options.address.empty()) {
    absl::StatusOr<std::string> address = ppft::agent::RouteAddress(options.coordinator);
    if (!address.ok()) return Fail(address.status());
    options.address = *std::move(address);
  }
  options.work_directory = std::filesystem::absolute(options.work_directory).string();

  // Blocked before any thread starts; one thread waits for them.
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
  ppft::LogInfo(options.name, ": ", options.devices.size(), " slots of ", options.devices[0].threads(), " threads, trainers at ", options.address,
                ", coordinator ", options.coordinator, ", metrics on ", (*http)->address());

  ppft::agent::Agent agent(options, &metrics);
  std::thread waiter([&] {
    int received = 0;
    sigwait(&signals, &received);
    agent.Shutdown();
  });
  const absl::Status status = agent.Run();
  kill(getpid(), SIGTERM);  // ends the waiter if Run failed by itself
  waiter.join();
  return status.ok() ? 0 : Fail(status);
}
