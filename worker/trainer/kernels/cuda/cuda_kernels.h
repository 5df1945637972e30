// Kernels of a CUDA device. fp32, bf16 and fp16 with fp32 sums; every call goes to the current stream and nothing waits for the device. Values that break
// the contract (a position beyond the table, a target outside the vocabulary) end in a device-side assert.
#pragma once

#include <memory>

#include "worker/trainer/kernels/kernels.h"

namespace ppft::trainer::cuda {

// lse of Attention is private to it and AttentionBackward: cuDNN lays it out by token.
std::unique_ptr<Kernels> MakeKernels(int device);

}  // namespace ppft::trainer::cuda
