// The CPU's implementation, by topic. Contracts: ../kernels.h.
#pragma once

#include "worker/trainer/kernels/kernels.h"

namespace ppft::trainer::cpu {

void MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);

void AddRmsNorm(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps, const at::Tensor& sum, const at::Tensor& normed,
                const at::Tensor& rstd);
void ApplyRmsNorm(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& normed);
void RmsNormBackward(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx);

void Rope(const at::Tensor& qkv, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position, bool inverse);

void SwiGlu(const at::Tensor& gate_up, const at::Tensor& out);
void SwiGluBackward(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& dgate_up);

void Attention(const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out, const at::Tensor& lse);
void AttentionBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                       const at::Tensor& lse, const at::Tensor& dqkv);

void CrossEntropy(const at::Tensor& logits, const at::Tensor& targets, double weight, bool with_gradient, const at::Tensor& loss_sum);

void Dropout(const at::Tensor& x, const DropoutSequence& sequence, const at::Tensor& out);
void DropoutBackward(const at::Tensor& dout, const DropoutSequence& sequence, const at::Tensor& dx);

}  // namespace ppft::trainer::cpu
