#include "common/base/process.h"

#include <fcntl.h>
#include <pthread.h>

#include <cstdio>
#include <filesystem>
#include <system_error>

#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/status.h"

namespace ppft {

std::string BesideThisBinary(const std::string& name) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  return (error ? std::filesystem::path(name) : self.parent_path() / name).string();
}

int ReportFailure(absl::string_view program, const absl::Status& status) {
  std::fprintf(stderr, "%s: %s\n", std::string(program).c_str(), std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? 2 : 1;
}

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

sigset_t BlockStopSignals() {
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  return signals;
}

void ShowStopping() {
  const Fd name(open("/proc/self/comm", O_WRONLY | O_CLOEXEC));
  const absl::Status written = name ? WriteAll(name.get(), "ppft-stopping", "/proc/self/comm") : absl::NotFoundError("no /proc/self/comm");
  if (!written.ok()) LogWarning("stopping, but the process list does not show it: ", written.message());
}

}  // namespace ppft
