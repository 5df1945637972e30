// AdamW on a device: masters, gradients and moments are flat fp32 buffers there, and the arithmetic is optim/adamw.h's to the bit.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {

// One parameter's place in the flat buffers.
struct FlatSpan {
  int64_t offset = 0;
  int64_t size = 0;
};

// A parameter's second home: `destination` (2-D, compute type, rows may be further apart, as the B columns of [W | s B] are) holds scale * parameter.
struct ComputeCopy {
  int64_t parameter = 0;  // index into FlatParameters::spans
  at::Tensor destination;
  double scale = 1.0;
};

struct FlatParameters {
  at::Tensor master;    // [n] fp32
  at::Tensor gradient;  // [n] fp32, or of the shard alone: [end - begin]
  std::vector<FlatSpan> spans;
  std::vector<ComputeCopy> copies;
  // A ZeRO shard: the elements [begin, end) are updated, moments exist for these alone.
  int64_t begin = 0;
  int64_t end = 0;
};

// Everything runs on the current stream; nothing waits. Errors: c10::Error. Thread: one at a time.
class DeviceOptimizer {
 public:
  virtual ~DeviceOptimizer() = default;

  // AdamW::Step of the shard; its elements' compute copies are written in the same pass.
  virtual void Step(const AdamWOptions& options, int64_t update, double learning_rate, double gradient_factor) = 0;
  // All compute copies from the masters (after a load, or when other shards came in).
  virtual void WriteCopies() = 0;
  // [spans] fp64 on the device: the sum of squares of each parameter's gradient as far as it is in the shard, in an order that depends on the size of that part
  // alone. Not finite exactly when one of the values is not. The same tensor in each call.
  virtual at::Tensor GradientSquares() = 0;

  // [end - begin] fp32, zero at first.
  virtual at::Tensor exp_avg() = 0;
  virtual at::Tensor exp_avg_sq() = 0;
};

}  // namespace ppft::trainer
