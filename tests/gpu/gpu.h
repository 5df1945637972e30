// What the GPU tests share: the plugin's runtime on device 0.
#pragma once

#include "worker/trainer/cuda/plugin.h"

namespace ppft::trainer {

// Loaded by main() before the first test.
CudaRuntime& Gpu();
inline at::TensorOptions OnGpu(at::ScalarType type) { return at::TensorOptions(type).device(at::kCUDA, 0); }

}  // namespace ppft::trainer
