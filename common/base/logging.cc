#include "common/base/logging.h"

#include <unistd.h>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace ppft {
namespace {
std::string& Component() {
  static std::string* component = new std::string("ppft");
  return *component;
}
}  // namespace

void SetLogComponent(absl::string_view component) { Component() = std::string(component); }

void LogLineToStderr(Severity severity, absl::string_view text) {
  const char letter = severity == Severity::kInfo ? 'I' : severity == Severity::kWarning ? 'W' : 'E';
  std::string line =
      absl::StrCat(absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone()), " ", std::string(1, letter), " ", Component(), ": ", text, "\n");
  // Nothing can be done about a closed stderr.
  [[maybe_unused]] ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace ppft
