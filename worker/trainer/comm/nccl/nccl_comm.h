// DeviceComms by NCCL. Part of the CUDA plugin.
#pragma once

#include <memory>

#include "worker/trainer/comm/device/device_comm.h"

namespace ppft::trainer::cuda {

std::unique_ptr<DeviceComms> MakeNcclComms(int device);

}  // namespace ppft::trainer::cuda
