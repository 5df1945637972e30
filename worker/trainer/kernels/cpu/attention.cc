// ATen's flash attention for CPUs (FlashAttention-2, 2307.08691) knows no cu_seqlens: one call per run of documents of equal length.
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

#include <cmath>

#include "worker/trainer/kernels/cpu/cpu_kernels.h"

namespace ppft::trainer::cpu {
namespace {

// `documents` documents of `length` tokens each, the first token at `begin`.
struct Run {
  int64_t begin = 0;
  int64_t documents = 0;
  int64_t length = 0;
};

std::vector<Run> EqualRuns(const std::vector<int32_t>& cu_seqlens) {
  std::vector<Run> runs;
  for (size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
    const int64_t length = cu_seqlens[d + 1] - cu_seqlens[d];
    if (length == 0) continue;
    if (!runs.empty() && runs.back().length == length) {
      ++runs.back().documents;
    } else {
      runs.push_back({cu_seqlens[d], 1, length});
    }
  }
  return runs;
}

// [documents, heads, length, head_dim] of columns [column, column + heads * head_dim) of the run's rows.
at::Tensor HeadView(const at::Tensor& rows, const Run& run, int64_t column, int64_t heads, int64_t head_dim) {
  const int64_t stride = rows.stride(0);
  return rows.as_strided({run.documents, heads, run.length, head_dim}, {run.length * stride, head_dim, stride, 1},
                         rows.storage_offset() + run.begin * stride + column);
}

// [documents, heads, length] of lse [heads, T].
at::Tensor LseView(const at::Tensor& lse, const Run& run) {
  const int64_t stride = lse.stride(0);
  return lse.as_strided({run.documents, lse.size(0), run.length}, {run.length, stride, 1}, lse.storage_offset() + run.begin);
}

}  // namespace

void Attention(const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out, const at::Tensor& lse) {
  const int64_t d = heads.head_dim;
  for (const Run& run : EqualRuns(cu_seqlens)) {
    const at::Tensor q = HeadView(qkv, run, 0, heads.q_heads, d);
    const at::Tensor k = HeadView(qkv, run, heads.q_size(), heads.kv_heads, d);
    const at::Tensor v = HeadView(qkv, run, heads.q_size() + heads.kv_size(), heads.kv_heads, d);
    const auto [o, l] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, /*is_causal=*/true);
    HeadView(out, run, 0, heads.q_heads, d).copy_(o);
    LseView(lse, run).copy_(l);
  }
}

void AttentionBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                       const at::Tensor& lse, const at::Tensor& dqkv) {
  const int64_t d = heads.head_dim;
  const int64_t k_column = heads.q_size();
  const int64_t v_column = heads.q_size() + heads.kv_size();
  for (const Run& run : EqualRuns(cu_seqlens)) {
    // The backward pass reads lse and q by their own strides; lse must be laid out as the forward pass gave it.
    const at::Tensor l = LseView(lse, run).transpose(1, 2).contiguous().transpose(1, 2);
    const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        HeadView(dout, run, 0, heads.q_heads, d), HeadView(qkv, run, 0, heads.q_heads, d), HeadView(qkv, run, k_column, heads.kv_heads, d),
        HeadView(qkv, run, v_column, heads.kv_heads, d), HeadView(out, run, 0, heads.q_heads, d), l, 0.0, /*is_causal=*/true);
    HeadView(dqkv, run, 0, heads.q_heads, d).copy_(dq);
    HeadView(dqkv, run, k_column, heads.kv_heads, d).copy_(dk);
    HeadView(dqkv, run, v_column, heads.kv_heads, d).copy_(dv);
  }
}

}  // namespace ppft::trainer::cpu
