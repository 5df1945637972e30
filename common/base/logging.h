// Log lines on stderr: "2026-11-23T10:00:00.123Z I component: text". One write per line, safe from any thread.
#pragma once

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace ppft {

enum class Severity { kInfo, kWarning, kError };

// Set once in main ("coordinator", "worker", "trainer").
void SetLogComponent(absl::string_view component);
void LogLineToStderr(Severity severity, absl::string_view text);

template <typename... Args>
void LogInfo(const Args&... args) {
  LogLineToStderr(Severity::kInfo, absl::StrCat(args...));
}
template <typename... Args>
void LogWarning(const Args&... args) {
  LogLineToStderr(Severity::kWarning, absl::StrCat(args...));
}
template <typename... Args>
void LogError(const Args&... args) {
  LogLineToStderr(Severity::kError, absl::StrCat(args...));
}

}  // namespace ppft
