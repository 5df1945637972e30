// RoPE's tables (2104.09864): cos and sin of position * inverse frequency, as transformers' default and llama3 initialisation make them (frequencies in fp32).
#pragma once

#include <ATen/core/Tensor.h>

#include "common/model/config.h"

namespace ppft::trainer {

// [head_dim / 2] fp32.
at::Tensor InverseFrequencies(const model::ModelConfig& config);

// Grows to the longest document seen.
class RopeTable {
 public:
  RopeTable(const model::ModelConfig& config, const at::TensorOptions& acc);

  void Reserve(int64_t positions);
  const at::Tensor& cos() const { return cos_; }  // [positions, head_dim / 2] acc
  const at::Tensor& sin() const { return sin_; }
  int64_t generation() const { return cos_.defined() ? cos_.size(0) : 0; }  // changes whenever the tables move

 private:
  const at::TensorOptions acc_;
  const at::Tensor inverse_frequencies_;
  at::Tensor cos_, sin_;
};

}  // namespace ppft::trainer
