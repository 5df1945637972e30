// When a device comes to the points of its work that the host has marked. No CUDA headers: the plugin makes one (CudaRuntime::MakeTimer).
//
// Errors: std::runtime_error. Thread: one, the one whose current stream is marked.
#pragma once

#include <cstdint>
#include <vector>

namespace ppft::trainer {

class DeviceTimer {
 public:
  virtual ~DeviceTimer() = default;

  // Marks where the caller's current stream stands in its queue. Costs the device nothing.
  virtual void Mark() = 0;
  // For each mark that was reached since the last call, in order: nanoseconds since the first mark. Never waits.
  virtual std::vector<int64_t> Collect() = 0;
  // Until the device has come to the newest mark.
  virtual void Wait() = 0;
};

}  // namespace ppft::trainer
