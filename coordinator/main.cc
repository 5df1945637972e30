// ppft-coordinator: accepts jobs, plans them, keeps all state, and tells the workers what to run.
#include <signal.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "coordinator/coordinator.h"

namespace {

constexpr absl::Duration kMostGpuWait = absl::Hours(8760);

int Fail(const absl::Status& status) { return ppft::ReportFailure("ppft-coordinator", status); }

}  // namespace

int main(int argc, char** argv) {
  ppft::SetLogComponent("coordinator");
  ppft::coordinator::CoordinatorOptions options;
  options.version = PPFT_VERSION;
  options.data_dir = "ppft-data";
  options.prepare_binary = ppft::BesideThisBinary("ppft-prepare");
  CLI::App app("Accepts fine-tuning jobs, plans them over the workers' devices and keeps all state.");
  app.add_option("--data_dir", options.data_dir, "folder of all state: database, datasets, checkpoints, artifacts")->capture_default_str();
  app.add_option("--listen", options.listen, "HOST:PORT of the service; port 0 = any")->capture_default_str();
  app.add_option("--metrics_listen", options.metrics_listen, "HOST:PORT of /metrics; port 0 = any")->capture_default_str();
  app.add_option("--model_root", options.model_roots, "folder under which model folders may be registered (repeatable)");
  std::string gpu_wait = "1h";
  app.add_option("--gpu_wait", gpu_wait, "how long jobs wait for GPUs of a lost worker before they take CPU slots, such as 30m; 0s = not at all")
      ->capture_default_str();
  app.add_option("--prepare", options.prepare_binary, "the ppft-prepare binary; default: beside this one");
  app.add_option("--tls_cert", options.tls.certificate, "PEM certificate of the server; needed to listen beyond this host");
  app.add_option("--tls_key", options.tls.key, "PEM key of the server");
  app.add_option("--tls_client_ca", options.tls.ca, "PEM authority whose certificates callers must show");
  app.set_version_flag("--version", PPFT_VERSION);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  if (!absl::ParseDuration(gpu_wait, &options.controller.gpu_wait) || options.controller.gpu_wait < absl::ZeroDuration() ||
      options.controller.gpu_wait > kMostGpuWait) {
    return Fail(absl::InvalidArgumentError(absl::StrCat("--gpu_wait ", gpu_wait, ": write a time with its unit from 0s to 8760h, such as 30m or 2h")));
  }

  const sigset_t signals = ppft::BlockStopSignals();
  auto coordinator = ppft::coordinator::Coordinator::Start(options);
  if (!coordinator.ok()) return Fail(coordinator.status());
  std::printf("listening on %s metrics on %s\n", (*coordinator)->address().c_str(), (*coordinator)->metrics_address().c_str());
  std::fflush(stdout);
  int received = 0;
  sigwait(&signals, &received);
  ppft::ShowStopping();
  ppft::LogInfo("stopping");
  coordinator->reset();
  return 0;
}
