// The face of libppft_cuda.so, which the trainer loads when its device is a CUDA device (loader.h). Both sides are built by one compiler from one tree;
// abi_version guards against a plugin of another build.
//
// Errors: c10::Error and std::runtime_error with CUDA's words (CatchTorch makes a Status of them). Thread: one at a time, each on its own current device and
// stream as CUDA has it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "worker/trainer/comm/device/device_comm.h"
#include "worker/trainer/cuda/device_timer.h"
#include "worker/trainer/kernels/kernels.h"
#include "worker/trainer/kernels/optimizer.h"

namespace ppft::trainer {

struct CudaDevice {
  int index = 0;
  std::string name;  // "NVIDIA H200"
  std::string uuid;  // "GPU-…"
  int64_t memory_bytes = 0;
  int compute_capability_major = 0;
  int compute_capability_minor = 0;
  std::string driver;  // "580.65.06"
};

struct CudaMemory {
  int64_t allocated_bytes = 0;  // held by tensors
  int64_t peak_allocated_bytes = 0;
  int64_t reserved_bytes = 0;  // taken from the device
  int64_t peak_reserved_bytes = 0;
  int64_t device_free_bytes = 0;  // of the whole device, other processes counted
  int64_t device_bytes = 0;
};

class CudaRuntime {
 public:
  virtual ~CudaRuntime() = default;

  // Empty without a usable device; `reason` then says why (no driver, driver too old, none visible).
  virtual std::vector<CudaDevice> Devices(std::string* reason) = 0;

  // Makes the device and a stream of its own (not the default one: that could not be captured) this thread's current ones. First call in a thread.
  virtual void Use(int device) = 0;
  // Waits until the device has done all work; throws what went wrong there.
  virtual void Synchronize(int device) = 0;

  // Loads the libraries that the first pass would wait for (cuDNN's, by building attention once). Any thread, beside the one that loads the model; takes about
  // a second and throws what the first pass would throw.
  virtual void LoadAttention(int device) = 0;

  // One object per device, alive until the process ends.
  virtual Kernels& KernelsOf(int device) = 0;
  virtual std::unique_ptr<DeviceOptimizer> MakeOptimizer(FlatParameters parameters) = 0;
  // Transfers to other devices; alive until the process ends.
  virtual DeviceComms& CommsOf(int device) = 0;
  // Attention and ATen take paths that give the same bits each time.
  virtual void SetDeterministic(bool deterministic) = 0;

  virtual CudaMemory Memory(int device) = 0;
  virtual void ResetPeakMemory(int device) = 0;
  // Gives cached memory back to the device.
  virtual void ReleaseCachedMemory() = 0;
  // For the stream that is this thread's current one.
  virtual std::unique_ptr<DeviceTimer> MakeTimer() = 0;
};

inline constexpr int kCudaPluginAbi = 3;

}  // namespace ppft::trainer

extern "C" {

struct PpftCudaPlugin {
  int abi_version;
  const char* torch_version;  // that it was built with
  ppft::trainer::CudaRuntime* runtime;
};

// nullptr if the plugin's version is another one.
__attribute__((visibility("default"))) const PpftCudaPlugin* ppft_cuda_plugin(int abi_version);
}
