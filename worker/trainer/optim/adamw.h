// AdamW (1711.05101) over part of a flat parameter buffer, with the arithmetic of torch.optim.AdamW in fp32. The flat buffer is the concatenation of a
// rank's parameters in their fixed order; a ZeRO shard is a range of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"

namespace ppft::trainer {

// One parameter's place in memory. The flat buffer is virtual: its elements lie where the model keeps them.
struct ParameterSpan {
  std::string name;
  float* master = nullptr;
  float* gradient = nullptr;
  int64_t size = 0;
};

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;
};

class AdamW {
 public:
  // Moments, zero at first, for the elements [begin, end) of the concatenation of `parameters`. Their memory must outlive this object.
  AdamW(const AdamWOptions& options, std::vector<ParameterSpan> parameters, int64_t begin, int64_t end);

  // One update of the elements [begin, end) with gradients times `gradient_factor` (clipping, loss scale; the gradients stay as they are). `update` counts
  // the updates from 1: the bias correction's exponent.
  void Step(int64_t update, double learning_rate, double gradient_factor);

  const std::vector<ParameterSpan>& parameters() const { return parameters_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  // [end - begin] each.
  std::vector<float>& exp_avg() { return exp_avg_; }
  std::vector<float>& exp_avg_sq() { return exp_avg_sq_; }

 private:
  const AdamWOptions options_;
  const std::vector<ParameterSpan> parameters_;
  const int64_t begin_;
  const int64_t end_;
  std::vector<float> exp_avg_;
  std::vector<float> exp_avg_sq_;
};

// The sum of squares in fp64, in a fixed order. Not finite exactly when one of the values is not.
double SumOfSquares(const float* values, int64_t size);

// torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1; 1 if max_norm is 0 (no clipping).
double ClipFactor(double norm, double max_norm);

}  // namespace ppft::trainer
