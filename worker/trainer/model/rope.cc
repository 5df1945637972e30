#include "worker/trainer/model/rope.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace ppft::trainer {

at::Tensor InverseFrequencies(const model::ModelConfig& config) {
  const at::Tensor exponent = at::arange(0, config.head_dim, 2, at::kLong).to(at::kFloat) / static_cast<double>(config.head_dim);
  const at::Tensor plain = at::pow(config.rope_theta, exponent).reciprocal();
  if (!config.rope_scaling) return plain;
  const model::RopeScaling& s = *config.rope_scaling;
  const double context = static_cast<double>(s.original_max_position_embeddings);
  const at::Tensor wavelength = plain.reciprocal() * (2 * std::numbers::pi);
  const at::Tensor smooth = (wavelength.reciprocal() * context - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  const at::Tensor blended = (1 - smooth) * plain / s.factor + smooth * plain;
  const at::Tensor low = at::where(wavelength > context / s.low_freq_factor, plain / s.factor, plain);
  const at::Tensor medium = (wavelength >= context / s.high_freq_factor).logical_and(wavelength <= context / s.low_freq_factor);
  return at::where(medium, blended, low);
}

RopeTable::RopeTable(const model::ModelConfig& config, const at::TensorOptions& acc) : acc_(acc), inverse_frequencies_(InverseFrequencies(config)) {}

void RopeTable::Reserve(int64_t positions) {
  if (cos_.defined() && cos_.size(0) >= positions) return;
  const int64_t rows = std::max<int64_t>(positions, cos_.defined() ? 2 * cos_.size(0) : 256);
  const at::Tensor angle = at::outer(at::arange(rows, at::kLong).to(at::kFloat), inverse_frequencies_);
  cos_ = at::cos(angle).to(acc_).contiguous();
  sin_ = at::sin(angle).to(acc_).contiguous();
}

}  // namespace ppft::trainer
