// What ppft-prepare gives up before it reads untrusted bytes: the network, new programs and processes, core dumps, unbounded memory, CPU time and
// file sizes. EDGE for the system calls behind it. Call once, before any thread is started.
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace ppft::coordinator::prepare {

struct SandboxLimits {
  int64_t memory_bytes = 0;  // address space
  int64_t cpu_seconds = 0;
  int64_t file_bytes = 0;  // of any one output
};

// Limits in proportion to the size of the input.
SandboxLimits LimitsFor(int64_t input_bytes);

// An empty network namespace is taken where the kernel allows it; the system call filter (no sockets, no programs, no processes) and the limits
// always hold on x86-64 and arm64. Errors name the system call that was refused; the process must not go on then.
absl::Status EnterSandbox(const SandboxLimits& limits);

}  // namespace ppft::coordinator::prepare
