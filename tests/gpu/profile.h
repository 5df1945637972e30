// What a GPU does during some steps: libtorch's profiler (kineto on CUPTI) around them, its Chrome trace in a file, and a table by kernel.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"

namespace ppft::trainer {

// Runs `body` once, which does `steps` steps and waits for the device. The trace goes to `file`, the table (microseconds per step, by name, the longest first)
// to standard output under `title`.
absl::Status ProfileSteps(const std::string& title, const std::string& file, int steps, const std::function<absl::Status()>& body);

}  // namespace ppft::trainer
