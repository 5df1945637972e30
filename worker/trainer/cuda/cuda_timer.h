// DeviceTimer with CUDA events, which it takes from a pool of its own.
#pragma once

#include <memory>

#include "worker/trainer/cuda/device_timer.h"

namespace ppft::trainer::cuda {

std::unique_ptr<DeviceTimer> MakeCudaTimer();

}  // namespace ppft::trainer::cuda
