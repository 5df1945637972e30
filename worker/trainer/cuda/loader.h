// Loads libppft_cuda.so and what it needs of LibTorch's CUDA part into this process. Needs no CUDA headers: the trainer is built without them.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "worker/trainer/cuda/plugin.h"

namespace ppft::trainer {

// "2.11.0", and the folder that libtorch_cpu.so was loaded from.
std::string LibTorchVersion();
std::string LibTorchFolder();

// Once per process and before the first use of tensors: LibTorch looks for its CUDA part only once. `path` is the plugin, or empty: libppft_cuda.so beside the
// running program or in ../lib. FAILED_PRECONDITION: the plugin or LibTorch's CUDA part is missing or of another version; the message says which and what to
// do. A machine without a GPU loads it too and has no Devices().
absl::StatusOr<CudaRuntime*> LoadCudaPlugin(const std::string& path);

}  // namespace ppft::trainer
