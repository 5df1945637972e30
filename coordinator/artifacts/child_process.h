// Runs one child process to its end: its output collected, bounded in time, memory and output, killed when nobody wants it any more. EDGE.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace ppft::coordinator {

struct ChildLimits {
  absl::Duration timeout = absl::Hours(6);
  int64_t max_memory_bytes = int64_t{64} << 30;  // address space
  int64_t max_file_bytes = int64_t{1} << 40;     // of one file that it writes
  size_t max_output_bytes = size_t{256} << 20;   // of stdout
};

struct ChildResult {
  int status = 0;  // exit status, if signal is 0
  int signal = 0;
  std::string output;  // stdout
  std::string errors;  // the last 8 KiB of stderr
};

// arguments[0] is the program's path. The child dies with the calling thread. CANCELLED when `cancelled` turned true, DEADLINE_EXCEEDED after the
// timeout, RESOURCE_EXHAUSTED if it printed too much (the child is killed then), NOT_FOUND if there is no such program.
absl::StatusOr<ChildResult> RunChild(const std::vector<std::string>& arguments, const ChildLimits& limits, const std::function<bool()>& cancelled);

}  // namespace ppft::coordinator
