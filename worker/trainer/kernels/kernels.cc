#include "worker/trainer/kernels/kernels.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>

#include <cstring>

namespace ppft::trainer {

QkvParts PartsOf(const at::Tensor& block, const HeadLayout& heads) {
  const int64_t tokens = block.size(0);
  const at::Tensor flat = block.view({tokens * heads.row_size()});
  const auto part = [&](int64_t begin, int64_t columns) { return flat.narrow(0, tokens * begin, tokens * columns).view({tokens, columns}); };
  return {part(0, heads.q_size()), part(heads.q_size(), heads.kv_size()), part(heads.q_size() + heads.kv_size(), heads.kv_size())};
}

void Kernels::MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  at::Tensor result = out;
  at::mm_out(result, a, b);
}

void Kernels::AddProduct(const at::Tensor& a, const at::Tensor& b, double alpha, const at::Tensor& sum) {
  if (sum.scalar_type() == a.scalar_type()) {
    sum.addmm_(a, b, 1.0, alpha);
  } else {
    sum.add_(at::mm(a, b), alpha);
  }
}

void Kernels::RmsNormBackwardAndNormed(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx,
                                       const at::Tensor& normed) {
  RmsNormBackward(dnormed, x, rstd, weight, dx);
  ApplyRmsNorm(x, rstd, weight, normed);
}

void Kernels::SwiGluBackwardAndGated(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& gated) {
  SwiGlu(gate_up, gated);
  SwiGluBackward(dout, gate_up, gate_up);
}

bool Kernels::SwiGluBackwardSums(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, const at::Tensor&, const at::Tensor&,
                                 const at::Tensor&, const at::Tensor&) {
  return false;
}

void Kernels::RopeToParts(const at::Tensor&, const HeadLayout&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const QkvParts&) {
  TORCH_CHECK(false, "these kernels take q, k and v in one row");
}

void Kernels::RopeFromParts(const QkvParts&, const HeadLayout&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) {
  TORCH_CHECK(false, "these kernels take q, k and v in one row");
}

void Kernels::AttentionOfParts(const QkvParts&, const HeadLayout&, const Documents&, const at::Tensor&, const at::Tensor&) {
  TORCH_CHECK(false, "these kernels take q, k and v in one row");
}

void Kernels::AttentionBackwardOfParts(const at::Tensor&, const QkvParts&, const HeadLayout&, const Documents&, const at::Tensor&, const at::Tensor&,
                                       const QkvParts&, const at::Tensor&) {
  TORCH_CHECK(false, "these kernels take q, k and v in one row");
}

std::vector<int32_t> Kernels::DocumentTable(const std::vector<int32_t>&, const HeadLayout&, int64_t) const { return {}; }

void Kernels::SpreadRows(const at::Tensor& rows, const at::Tensor& row_of, const at::Tensor& out) {
  const int32_t* const from = row_of.data_ptr<int32_t>();
  const size_t bytes = static_cast<size_t>(out.size(1)) * out.element_size();
  const char* const in = static_cast<const char*>(rows.data_ptr());
  char* const to = static_cast<char*>(out.data_ptr());
  for (int64_t t = 0; t < out.size(0); ++t) {
    if (from[t] < 0) {
      std::memset(to + static_cast<size_t>(t) * bytes, 0, bytes);
    } else {
      std::memcpy(to + static_cast<size_t>(t) * bytes, in + static_cast<size_t>(from[t]) * bytes, bytes);
    }
  }
}

std::unique_ptr<CapturedWork> Kernels::Capture(const std::function<void()>&) { return nullptr; }

}  // namespace ppft::trainer
