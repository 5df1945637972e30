#include "worker/trainer/cuda/attention.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "worker/trainer/kernels/cuda/launch.h"
#include "worker/trainer/kernels/cuda/tensor.h"

namespace ppft::trainer::cuda {
namespace {

bool IsAligned(const at::Tensor& rows) {
  return reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0 && rows.stride(0) * rows.element_size() % 16 == 0 && rows.stride(1) == 1;
}

// The rows themselves, or a dense copy if their addresses do not suit vector loads.
at::Tensor AlignedRows(const at::Tensor& rows) { return IsAligned(rows) ? rows : rows.clone(at::MemoryFormat::Contiguous); }

// [tokens, heads, head_dim] of columns from `column`.
at::Tensor HeadView(const at::Tensor& rows, int64_t column, int64_t heads, int64_t head_dim) {
  return rows.narrow(1, column, heads * head_dim).unflatten(1, {heads, head_dim});
}

// One document's rows of one group of query heads and its key-value head: [group * n, head_dim], the heads one after another, and [n, head_dim].
struct Group {
  Group(const HeadLayout& heads, int64_t begin, int64_t n, int64_t kv_head) : heads(heads), begin(begin), n(n), kv_head(kv_head) {}

  int64_t size() const { return heads.q_heads / heads.kv_heads; }
  // Query-head columns of the rows: [group, n, head_dim], a view.
  at::Tensor QueryView(const at::Tensor& rows) const {
    return HeadView(rows.narrow(0, begin, n), kv_head * size() * heads.head_dim, size(), heads.head_dim).transpose(0, 1);
  }
  at::Tensor Query(const at::Tensor& rows) const { return QueryView(rows).contiguous().view({size() * n, heads.head_dim}); }
  at::Tensor Key(const at::Tensor& rows) const { return rows.narrow(0, begin, n).narrow(1, heads.q_size() + kv_head * heads.head_dim, heads.head_dim); }
  at::Tensor Value(const at::Tensor& rows) const {
    return rows.narrow(0, begin, n).narrow(1, heads.q_size() + heads.kv_size() + kv_head * heads.head_dim, heads.head_dim);
  }
  at::Tensor Lse(const at::Tensor& lse) const { return lse.narrow(0, kv_head * size(), size()).narrow(1, begin, n); }  // [group, n]
  // [group, n, n], the future masked.
  at::Tensor Scores(const at::Tensor& qkv) const {
    const at::Tensor future = at::full({n, n}, -INFINITY, qkv.options()).triu_(1);
    return at::mm(Query(qkv), Key(qkv).t()).mul_(1.0 / std::sqrt(static_cast<double>(heads.head_dim))).view({size(), n, n}).add_(future);
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

void ProductsForward(const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out, const at::Tensor& lse) {
  ForEachGroup(heads, cu_seqlens, [&](const Group& g) {
    at::Tensor scores = g.Scores(qkv);
    const at::Tensor sums = at::logsumexp(scores, -1);
    g.Lse(lse).copy_(sums);
    const at::Tensor p = scores.sub_(sums.unsqueeze(-1)).exp_().view({g.size() * g.n, g.n});
    g.QueryView(out).copy_(at::mm(p, g.Value(qkv)).view({g.size(), g.n, heads.head_dim}));
  });
}

void ProductsBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                      const at::Tensor& lse, const at::Tensor& dqkv) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(heads.head_dim));
  ForEachGroup(heads, cu_seqlens, [&](const Group& g) {
    const at::Tensor p = g.Scores(qkv).sub_(g.Lse(lse).unsqueeze(-1)).exp_().view({g.size() * g.n, g.n});
    const at::Tensor d = g.Query(dout);
    const at::Tensor dot = (d * g.Query(out)).sum(-1, /*keepdim=*/true);
    const at::Tensor ds = at::mm(d, g.Value(qkv).t()).sub_(dot).mul_(p).mul_(scale);
    g.QueryView(dqkv).copy_(at::mm(ds, g.Key(qkv)).view({g.size(), g.n, heads.head_dim}));
    g.Key(dqkv).copy_(at::mm(ds.t(), g.Query(qkv)));
    g.Value(dqkv).copy_(at::mm(p.t(), d));
  });
}

// The memory of lse [q_heads, tokens] as one block, laid out freely.
float* LseBlock(const at::Tensor& lse, const HeadLayout& heads, int64_t tokens) {
  const int64_t room = static_cast<int64_t>(lse.storage().nbytes()) / lse.element_size() - lse.storage_offset();
  TORCH_CHECK(lse.is_cuda() && lse.scalar_type() == at::kFloat && room >= heads.q_heads * tokens, "attention: lse has room for ", room, " values, ",
              heads.q_heads * tokens, " are needed");
  return lse.data_ptr<float>();
}

void Join(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const HeadLayout& heads, const at::Tensor& dqkv) {
  const int64_t tokens = dqkv.size(0);
  const at::ScalarType type = dqkv.scalar_type();
  const Matrix parts[3] = {MatrixOf(dq, type, tokens, heads.q_size()), MatrixOf(dk, type, tokens, heads.kv_size()),
                           MatrixOf(dv, type, tokens, heads.kv_size())};
  const int64_t columns[3] = {heads.q_size(), heads.kv_size(), heads.kv_size()};
  JoinColumns(TypeOf(dqkv), tokens, parts, columns, MatrixOf(dqkv, type, tokens, heads.row_size()), c10::cuda::getCurrentCUDAStream());
}

}  // namespace

Attention::Attention(const at::Device& device) : device_(device), documents_(device) {
  int major = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()), "cudaDeviceGetAttribute");
  hopper_or_later_ = major >= 9;
}

AttentionPath Attention::PathOf(const at::Tensor& qkv, const HeadLayout& heads, const Documents& documents, int64_t out_stride) {
  const at::ScalarType type = qkv.scalar_type();
  const bool narrow = type == at::kBFloat16 || type == at::kHalf;
  if (!narrow || heads.head_dim % 8 != 0 || heads.head_dim > 256) return AttentionPath::kProducts;
  if (!cudnn_enabled_ || at::globalContext().deterministicAlgorithms()) return AttentionPath::kFlash;
  std::string reason;
  if (!hopper_or_later_) {
    reason = "the GPU's compute capability is below 9.0";
  } else if (heads.head_dim > 128) {
    reason = "heads of more than 128 columns";
  } else if (documents.tokens() * std::max({qkv.stride(0), out_stride, heads.q_size()}) > INT32_MAX) {
    reason = "micro-batches beyond 32-bit offsets";
  } else {
    if (cudnn_ == nullptr) cudnn_ = std::make_unique<CudnnAttention>();
    if (cudnn_->Serves(AttentionShape(type, heads, documents, qkv.stride(0), out_stride), &reason)) return AttentionPath::kCudnn;
  }
  if (reported_.insert(reason).second) TORCH_WARN("attention: flash attention in place of cuDNN: ", reason);
  return AttentionPath::kFlash;
}

void Attention::Forward(const at::Tensor& given_qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                        const at::Tensor& lse) {
  Documents& documents = documents_.Get(cu_seqlens);
  const int64_t tokens = documents.tokens();
  MatrixOf(given_qkv, given_qkv.scalar_type(), tokens, heads.row_size());
  MatrixOf(out, given_qkv.scalar_type(), tokens, heads.q_size());
  const at::Tensor qkv = AlignedRows(given_qkv);
  const at::Tensor written = IsAligned(out) ? out : at::empty({tokens, heads.q_size()}, out.options());
  switch (PathOf(qkv, heads, documents, written.stride(0))) {
    case AttentionPath::kCudnn: {
      const AttentionShape shape(qkv.scalar_type(), heads, documents, qkv.stride(0), written.stride(0));
      cudnn_->Forward(shape, heads, documents, qkv, written, LseBlock(lse, heads, tokens));
      break;
    }
    case AttentionPath::kFlash: {
      const auto result =
          at::_flash_attention_forward(HeadView(qkv, 0, heads.q_heads, heads.head_dim), HeadView(qkv, heads.q_size(), heads.kv_heads, heads.head_dim),
                                       HeadView(qkv, heads.q_size() + heads.kv_size(), heads.kv_heads, heads.head_dim), documents.cu(), documents.cu(),
                                       documents.longest(), documents.longest(), /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false,
                                       std::optional<double>(1.0 / std::sqrt(static_cast<double>(heads.head_dim))));
      written.copy_(std::get<0>(result).flatten(1));
      lse.copy_(std::get<1>(result));
      break;
    }
    case AttentionPath::kProducts:
      ProductsForward(qkv, heads, cu_seqlens, written, lse);
      break;
  }
  if (!written.is_same(out)) out.copy_(written);
}

void Attention::Backward(const at::Tensor& given_dout, const at::Tensor& given_qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens,
                         const at::Tensor& given_out, const at::Tensor& lse, const at::Tensor& dqkv) {
  Documents& documents = documents_.Get(cu_seqlens);
  const int64_t tokens = documents.tokens();
  const at::ScalarType type = given_qkv.scalar_type();
  MatrixOf(given_dout, type, tokens, heads.q_size());
  MatrixOf(given_qkv, type, tokens, heads.row_size());
  MatrixOf(given_out, type, tokens, heads.q_size());
  MatrixOf(dqkv, type, tokens, heads.row_size());
  const at::Tensor qkv = AlignedRows(given_qkv), out = AlignedRows(given_out), dout = AlignedRows(given_dout);
  switch (PathOf(qkv, heads, documents, out.stride(0))) {
    case AttentionPath::kCudnn: {
      const AttentionShape shape(type, heads, documents, qkv.stride(0), out.stride(0));
      const at::Tensor dq = at::empty({tokens, heads.q_size()}, qkv.options());
      const at::Tensor dk = at::empty({tokens, heads.kv_size()}, qkv.options()), dv = at::empty({tokens, heads.kv_size()}, qkv.options());
      cudnn_->Backward(shape, heads, documents, dout, qkv, out, LseBlock(lse, heads, tokens), dq, dk, dv);
      Join(dq, dk, dv, heads, dqkv);
      break;
    }
    case AttentionPath::kFlash: {
      if (!rng_state_.defined()) rng_state_ = at::zeros({2}, at::TensorOptions(at::kLong).device(device_)).view(at::kUInt64);
      const auto [dq, dk, dv] = at::_flash_attention_backward(
          HeadView(dout, 0, heads.q_heads, heads.head_dim), HeadView(qkv, 0, heads.q_heads, heads.head_dim),
          HeadView(qkv, heads.q_size(), heads.kv_heads, heads.head_dim), HeadView(qkv, heads.q_size() + heads.kv_size(), heads.kv_heads, heads.head_dim),
          HeadView(out, 0, heads.q_heads, heads.head_dim), lse.contiguous(), documents.cu(), documents.cu(), documents.longest(), documents.longest(),
          /*dropout_p=*/0.0, /*is_causal=*/true, rng_state_, rng_state_, std::optional<double>(1.0 / std::sqrt(static_cast<double>(heads.head_dim))));
      Join(dq.flatten(1), dk.flatten(1), dv.flatten(1), heads, dqkv);
      break;
    }
    case AttentionPath::kProducts:
      ProductsBackward(dout, qkv, heads, cu_seqlens, out, lse, dqkv);
      break;
  }
}

}  // namespace ppft::trainer::cuda
