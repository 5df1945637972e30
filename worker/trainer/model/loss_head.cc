#include "worker/trainer/model/loss_head.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

namespace ppft::trainer {

LossHead::LossHead(at::Tensor norm, at::Tensor weight, double eps, int64_t chunk_rows, Kernels& kernels)
    : norm_(std::move(norm)),
      weight_(std::move(weight)),
      eps_(eps),
      chunk_rows_(std::max<int64_t>(1, chunk_rows)),
      acc_(norm_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
      kernels_(kernels) {}

LossHead::Normed LossHead::Norm(const at::Tensor& base, const at::Tensor& delta, const at::Tensor& rows, Scratch& scratch) {
  const int64_t n = rows.size(0);
  const int64_t hidden = norm_.size(0);
  Normed result;
  result.hidden = scratch.Get(Scratch::kHeadHidden, n, hidden);
  result.normed = scratch.Get(Scratch::kHeadNormed, n, hidden);
  result.rstd = at::empty({n}, norm_.options().dtype(acc_));
  at::index_select_out(result.hidden, base, 0, rows);
  at::Tensor selected = scratch.Get(Scratch::kHeadDelta, n, hidden);
  at::index_select_out(selected, delta, 0, rows);
  kernels_.AddRmsNorm(result.hidden, selected, norm_, eps_, result.hidden, result.normed, result.rstd);
  return result;
}

at::Tensor LossHead::Forward(const at::Tensor& base, const at::Tensor& delta, const at::Tensor& rows, const at::Tensor& target_ids, const LossWeight& weight,
                             const at::Tensor& gradient, Scratch& scratch) {
  const int64_t n = rows.size(0);
  if (n == 0) return at::Tensor();
  const Normed x = Norm(base, delta, rows, scratch);
  const at::Tensor sum = at::zeros({1}, norm_.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < n; begin += chunk_rows_) {
    const int64_t size = std::min(chunk_rows_, n - begin);
    at::Tensor logits = scratch.Get(Scratch::kLogits, size, weight_.size(0));
    at::Tensor normed = x.normed.narrow(0, begin, size);
    kernels_.MatMul(normed, weight_.t(), logits);
    kernels_.CrossEntropy(logits, target_ids.narrow(0, begin, size), weight, gradient.defined(), sum);
    if (gradient.defined()) kernels_.MatMul(logits, weight_, normed);  // the normed rows become their gradient
  }
  if (gradient.defined()) {
    gradient.zero_();
    kernels_.RmsNormBackward(x.normed, x.hidden, x.rstd, norm_, gradient);
  }
  return sum;
}

at::Tensor LossHead::Logits(const at::Tensor& base, const at::Tensor& delta, const at::Tensor& rows, Scratch& scratch) {
  return at::mm(Norm(base, delta, rows, scratch).normed, weight_.t()).to(acc_);
}

}  // namespace ppft::trainer
