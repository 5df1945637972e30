// DeviceOptimizer of a CUDA device. Contract: ../optimizer.h.
#pragma once

#include <memory>

#include "worker/trainer/kernels/optimizer.h"

namespace ppft::trainer::cuda {

std::unique_ptr<DeviceOptimizer> MakeDeviceOptimizer(FlatParameters parameters);

}  // namespace ppft::trainer::cuda
