// The last stage's end: final RMSNorm, the head's product, cross-entropy. Only rows with a supervised next token get here. The gradient of the hidden state is
// made in the same pass, a chunk of rows at a time, so that the logits never exist as a whole.
//
// Thread: one at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/trainer/kernels/kernels.h"
#include "worker/trainer/model/activations.h"

namespace ppft::trainer {

class LossHead {
 public:
  // norm: [hidden], weight: [vocab, hidden], both compute dtype (weight may be the embedding's).
  LossHead(at::Tensor norm, at::Tensor weight, double eps, int64_t chunk_rows, Kernels& kernels);

  // The hidden state is base + delta ([T, hidden]). Returns the sum of -log p over the targets, [1] fp64 (undefined without targets). gradient: [targets,
  // hidden], written if defined: weight * d(sum of -log p) / d(hidden at rows).
  at::Tensor Forward(const at::Tensor& base, const at::Tensor& delta, const at::Tensor& rows, const at::Tensor& target_ids, const LossWeight& weight,
                     const at::Tensor& gradient, Scratch& scratch);
  // [rows, vocab] acc.
  at::Tensor Logits(const at::Tensor& base, const at::Tensor& delta, const at::Tensor& rows, Scratch& scratch);

  const at::Tensor& norm() const { return norm_; }
  const at::Tensor& weight() const { return weight_; }

 private:
  struct Normed {
    at::Tensor hidden;  // [rows, hidden]
    at::Tensor normed;  // [rows, hidden]
    at::Tensor rstd;    // [rows]
  };
  Normed Norm(const at::Tensor& base, const at::Tensor& delta, const at::Tensor& rows, Scratch& scratch);

  const at::Tensor norm_;
  const at::Tensor weight_;
  const double eps_;
  const int64_t chunk_rows_;
  const at::ScalarType acc_;
  Kernels& kernels_;
};

}  // namespace ppft::trainer
