#include "worker/trainer/cuda/attention.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "common/model/memory.h"
#include "worker/trainer/kernels/cuda/launch.h"
#include "worker/trainer/kernels/cuda/tensor.h"

namespace ppft::trainer::cuda {
namespace {

bool IsAligned(const at::Tensor& rows) {
  return reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0 && rows.stride(0) * rows.element_size() % 16 == 0 && rows.stride(1) == 1;
}

// The rows themselves, or a copy in rows `stride` apart where their addresses or stride do not suit.
at::Tensor RowsWithStride(const at::Tensor& rows, int64_t stride) {
  if (IsAligned(rows) && rows.stride(0) == stride) return rows;
  const at::Tensor copy = at::empty({rows.size(0), stride}, rows.options()).narrow(1, 0, rows.size(1));
  copy.copy_(rows);
  return copy;
}

at::Tensor Aligned(const at::Tensor& part) { return IsAligned(part) ? part : part.clone(); }
QkvParts Aligned(const QkvParts& parts) { return {Aligned(parts.q), Aligned(parts.k), Aligned(parts.v)}; }

// [tokens, heads, head_dim].
at::Tensor HeadView(const at::Tensor& rows, int64_t heads, int64_t head_dim) { return rows.unflatten(1, {heads, head_dim}); }

// One document's rows of one group of query heads and its key-value head: [group * n, head_dim], the heads one after another, and [n, head_dim]; fp32, for
// probabilities rounded to 16 bits would not add up to 1.
struct Group {
  Group(const HeadLayout& heads, int64_t begin, int64_t n, int64_t kv_head) : heads(heads), begin(begin), n(n), kv_head(kv_head) {}

  int64_t size() const { return heads.q_heads / heads.kv_heads; }
  // Query-head columns of rows: [group, n, head_dim], a view.
  at::Tensor QueryView(const at::Tensor& rows) const {
    return HeadView(rows.narrow(0, begin, n).narrow(1, kv_head * size() * heads.head_dim, size() * heads.head_dim), size(), heads.head_dim).transpose(0, 1);
  }
  at::Tensor Query(const at::Tensor& rows) const { return QueryView(rows).contiguous().view({size() * n, heads.head_dim}).to(at::kFloat); }
  // Of k or v: columns of rows, a view.
  at::Tensor SharedView(const at::Tensor& rows) const { return rows.narrow(0, begin, n).narrow(1, kv_head * heads.head_dim, heads.head_dim); }
  at::Tensor Shared(const at::Tensor& rows) const { return SharedView(rows).to(at::kFloat); }
  at::Tensor Lse(const at::Tensor& lse) const { return lse.narrow(0, kv_head * size(), size()).narrow(1, begin, n); }  // [group, n]
  // [group, n, n], the future masked.
  at::Tensor Scores(const QkvParts& qkv) const {
    const at::Tensor future = at::full({n, n}, -INFINITY, qkv.q.options().dtype(at::kFloat)).triu_(1);
    return at::mm(Query(qkv.q), Shared(qkv.k).t()).mul_(1.0 / std::sqrt(static_cast<double>(heads.head_dim))).view({size(), n, n}).add_(future);
  }

  const HeadLayout& heads;
  const int64_t begin, n, kv_head;
};

template <typename Body>
void ForEachGroup(const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, Body&& body) {
  for (size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
    const int64_t n = cu_seqlens[d + 1] - cu_seqlens[d];
    for (int64_t kv_head = 0; n > 0 && kv_head < heads.kv_heads; ++kv_head) body(Group(heads, cu_seqlens[d], n, kv_head));
  }
}

void ProductsForward(const QkvParts& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out, const at::Tensor& lse) {
  ForEachGroup(heads, cu_seqlens, [&](const Group& g) {
    at::Tensor scores = g.Scores(qkv);
    const at::Tensor sums = at::logsumexp(scores, -1);
    g.Lse(lse).copy_(sums);
    const at::Tensor p = scores.sub_(sums.unsqueeze(-1)).exp_().view({g.size() * g.n, g.n});
    g.QueryView(out).copy_(at::mm(p, g.Shared(qkv.v)).view({g.size(), g.n, heads.head_dim}));
  });
}

void ProductsBackward(const at::Tensor& dout, const QkvParts& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                      const at::Tensor& lse, const QkvParts& dqkv) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(heads.head_dim));
  ForEachGroup(heads, cu_seqlens, [&](const Group& g) {
    const at::Tensor p = g.Scores(qkv).sub_(g.Lse(lse).unsqueeze(-1)).exp_().view({g.size() * g.n, g.n});
    const at::Tensor d = g.Query(dout);
    const at::Tensor dot = (d * g.Query(out)).sum(-1, /*keepdim=*/true);
    const at::Tensor ds = at::mm(d, g.Shared(qkv.v).t()).sub_(dot).mul_(p).mul_(scale);
    g.QueryView(dqkv.q).copy_(at::mm(ds, g.Shared(qkv.k)).view({g.size(), g.n, heads.head_dim}));
    g.SharedView(dqkv.k).copy_(at::mm(ds.t(), g.Query(qkv.q)));
    g.SharedView(dqkv.v).copy_(at::mm(p.t(), d));
  });
}

// The memory of lse [q_heads, tokens] as one block, laid out freely.
float* LseBlock(const at::Tensor& lse, const HeadLayout& heads, int64_t tokens) {
  const int64_t room = static_cast<int64_t>(lse.storage().nbytes()) / lse.element_size() - lse.storage_offset();
  TORCH_CHECK(lse.is_cuda() && lse.scalar_type() == at::kFloat && room >= heads.q_heads * tokens, "attention: lse has room for ", room, " values, ",
              heads.q_heads * tokens, " are needed");
  return lse.data_ptr<float>();
}

void CheckParts(const QkvParts& parts, at::ScalarType type, int64_t tokens, const HeadLayout& heads) {
  const std::pair<const at::Tensor*, int64_t> all[] = {{&parts.q, heads.q_size()}, {&parts.k, heads.kv_size()}, {&parts.v, heads.kv_size()}};
  for (const auto& [part, columns] : all) {
    MatrixOf(*part, type, tokens, columns);
    TORCH_CHECK(part->is_contiguous(), "attention: q, k and v must be contiguous");
  }
}

}  // namespace

Attention::Attention(const at::Device& device) : device_(device) {
  int major = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()), "cudaDeviceGetAttribute");
  hopper_or_later_ = major >= 9;
}

AttentionPath Attention::PathOf(at::ScalarType type, const HeadLayout& heads, const DocumentsShape& documents, int64_t out_stride) {
  if (model::AttentionIsPlainProducts(static_cast<int64_t>(c10::elementSize(type)), heads.head_dim)) return AttentionPath::kProducts;
  if (at::globalContext().deterministicAlgorithms()) return AttentionPath::kFlash;
  std::string reason;
  if (!hopper_or_later_) {
    reason = "the GPU's compute capability is below 9.0";
  } else if (heads.head_dim > 128) {
    reason = "heads of more than 128 columns";
  } else {
    if (cudnn_ == nullptr) cudnn_ = std::make_unique<CudnnAttention>();
    if (cudnn_->Serves(ShapeOf(type, heads, documents, out_stride), &reason)) return AttentionPath::kCudnn;
  }
  if (reported_.insert(reason).second) TORCH_WARN("attention: flash attention in place of cuDNN: ", reason);
  return AttentionPath::kFlash;
}

void Attention::Load() {
  const HeadLayout heads{8, 8, 64};
  PathOf(at::kBFloat16, heads, DocumentsShape({0, 512}), heads.q_size());
}

AttentionShape Attention::ShapeOf(at::ScalarType type, const HeadLayout& heads, const DocumentsShape& documents, int64_t out_stride) {
  if (documents.uniform > 0) {
    const AttentionShape uniform(type, heads, documents, out_stride, true);
    if (cudnn_->Serves(uniform, nullptr)) return uniform;
  }
  return AttentionShape(type, heads, documents, out_stride, false);
}

void Attention::Forward(const QkvParts& given_qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse) {
  const at::ScalarType type = given_qkv.q.scalar_type();
  const int64_t tokens = given_qkv.q.size(0);
  CheckParts(given_qkv, type, tokens, heads);
  MatrixOf(out, type, tokens, heads.q_size());
  const QkvParts qkv = Aligned(given_qkv);
  const int64_t stride = RowStride(heads, out.stride(0));
  const at::Tensor written = IsAligned(out) && out.stride(0) == stride ? out : at::empty({tokens, stride}, out.options()).narrow(1, 0, heads.q_size());
  const DocumentsShape shape(documents.cu_seqlens);
  switch (PathOf(type, heads, shape, stride)) {
    case AttentionPath::kCudnn: {
      const DocumentTable table(documents, heads, stride, device_);
      cudnn_->Forward(ShapeOf(type, heads, shape, stride), table, qkv, written, LseBlock(lse, heads, tokens));
      break;
    }
    case AttentionPath::kFlash: {
      const DocumentTable table(documents, heads, stride, device_);
      const auto result = at::_flash_attention_forward(HeadView(qkv.q, heads.q_heads, heads.head_dim), HeadView(qkv.k, heads.kv_heads, heads.head_dim),
                                                       HeadView(qkv.v, heads.kv_heads, heads.head_dim), table.cu(), table.cu(), shape.longest, shape.longest,
                                                       /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false,
                                                       std::optional<double>(1.0 / std::sqrt(static_cast<double>(heads.head_dim))));
      written.copy_(std::get<0>(result).flatten(1));
      lse.copy_(std::get<1>(result));
      break;
    }
    case AttentionPath::kProducts:
      ProductsForward(qkv, heads, documents.cu_seqlens, written, lse);
      break;
  }
  if (!written.is_same(out)) out.copy_(written);
}

void Attention::Backward(const at::Tensor& given_dout, const QkvParts& given_qkv, const HeadLayout& heads, const Documents& documents,
                         const at::Tensor& given_out, const at::Tensor& lse, const QkvParts& dqkv, const at::Tensor& room) {
  const at::ScalarType type = given_qkv.q.scalar_type();
  const int64_t tokens = given_qkv.q.size(0);
  CheckParts(given_qkv, type, tokens, heads);
  CheckParts(dqkv, type, tokens, heads);
  MatrixOf(given_dout, type, tokens, heads.q_size());
  MatrixOf(given_out, type, tokens, heads.q_size());
  const QkvParts qkv = Aligned(given_qkv);
  const DocumentsShape shape(documents.cu_seqlens);
  const int64_t stride = RowStride(heads, given_out.stride(0));
  switch (PathOf(type, heads, shape, stride)) {
    case AttentionPath::kCudnn: {
      const DocumentTable table(documents, heads, stride, device_);
      const QkvParts written =
          IsAligned(dqkv.q) && IsAligned(dqkv.k) && IsAligned(dqkv.v) ? dqkv : QkvParts{at::empty_like(dqkv.q), at::empty_like(dqkv.k), at::empty_like(dqkv.v)};
      cudnn_->Backward(ShapeOf(type, heads, shape, stride), table, RowsWithStride(given_dout, stride), qkv, RowsWithStride(given_out, stride),
                       LseBlock(lse, heads, tokens), written, room);
      if (!written.q.is_same(dqkv.q)) {
        dqkv.q.copy_(written.q);
        dqkv.k.copy_(written.k);
        dqkv.v.copy_(written.v);
      }
      break;
    }
    case AttentionPath::kFlash: {
      const DocumentTable table(documents, heads, stride, device_);
      if (!rng_state_.defined()) rng_state_ = at::zeros({2}, at::TensorOptions(at::kLong).device(device_)).view(at::kUInt64);
      const at::Tensor out = IsAligned(given_out) ? given_out : given_out.contiguous(), dout = IsAligned(given_dout) ? given_dout : given_dout.contiguous();
      const auto [dq, dk, dv] = at::_flash_attention_backward(HeadView(dout, heads.q_heads, heads.head_dim), HeadView(qkv.q, heads.q_heads, heads.head_dim),
                                                              HeadView(qkv.k, heads.kv_heads, heads.head_dim), HeadView(qkv.v, heads.kv_heads, heads.head_dim),
                                                              HeadView(out, heads.q_heads, heads.head_dim), lse.contiguous(), table.cu(), table.cu(),
                                                              shape.longest, shape.longest, /*dropout_p=*/0.0, /*is_causal=*/true, rng_state_, rng_state_,
                                                              std::optional<double>(1.0 / std::sqrt(static_cast<double>(heads.head_dim))));
      dqkv.q.copy_(dq.flatten(1));
      dqkv.k.copy_(dk.flatten(1));
      dqkv.v.copy_(dv.flatten(1));
      break;
    }
    case AttentionPath::kProducts:
      ProductsBackward(given_dout, qkv, heads, documents.cu_seqlens, given_out, lse, dqkv);
      break;
  }
}

}  // namespace ppft::trainer::cuda
