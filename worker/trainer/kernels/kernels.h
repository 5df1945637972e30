// The arithmetic of a training step on plain tensors in buffers of the caller (small products of the adapters go to ATen directly). Knows no model. One
// implementation per device kind; all are deterministic: reductions have a fixed order that does not depend on the number of threads.
//
// Shapes: T = rows (tokens), H = columns. "rows" means a 2-D tensor whose columns lie side by side and whose rows may be further apart (a view into a
// wider buffer). All float tensors of a call have one dtype (fp32, bf16, fp16; fp64 on CPU for gradient checks) unless said; "acc" is fp64 for
// fp64 and fp32 otherwise. Thread: one call at a time per object. Errors: c10::Error for shapes and types that break the contract.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

namespace ppft::trainer {

// Heads in one packed row [q heads | k heads | v heads], head_dim columns each.
struct HeadLayout {
  int64_t q_heads = 0;
  int64_t kv_heads = 0;  // divides q_heads
  int64_t head_dim = 0;  // even

  int64_t q_size() const { return q_heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
  int64_t row_size() const { return q_size() + 2 * kv_size(); }
};

// Which numbers dropout draws: element (row, column) of this sequence is kept or dropped whatever the partition of the model.
struct DropoutSequence {
  std::array<uint32_t, 2> key{};  // Philox key
  uint32_t stream = 0;
  double p = 0.0;  // probability of dropping, below 1; kept elements are scaled by 1 / (1 - p)
};

class Kernels {
 public:
  virtual ~Kernels() = default;

  // out = a b, for products with a stored weight. a: rows [M, K]; b: [K, N], a matrix or its transpose; out: rows [M, N]. By default ATen's mm.
  virtual void MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);

  // sum = x + delta (sum may be x; without delta x is read and sum ignored); rstd[t] = 1 / sqrt(mean(sum[t]^2) + eps); normed = sum * rstd * weight.
  // x, delta, sum: [T, H]; weight: [H]; normed: rows [T, H]; rstd: [T] acc.
  virtual void AddRmsNorm(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps, const at::Tensor& sum, const at::Tensor& normed,
                          const at::Tensor& rstd) = 0;
  // normed = x * rstd * weight: what AddRmsNorm wrote, made again for the backward pass.
  virtual void ApplyRmsNorm(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& normed) = 0;
  // dx += gradient of the norm; the weight is frozen. dnormed: rows [T, H].
  virtual void RmsNormBackward(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx) = 0;

  // Rotates q and k of the packed rows in place, halves paired as Hugging Face's Llama does (column i with i + head_dim / 2).
  // qkv: rows [T, row_size]; cos, sin: [positions, head_dim / 2] acc; position: [T] int32. inverse: the transpose, for gradients.
  virtual void Rope(const at::Tensor& qkv, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position, bool inverse) = 0;

  // out = silu(gate) * up. gate_up: [T, 2F] = [gate | up]; out: rows [T, F].
  virtual void SwiGlu(const at::Tensor& gate_up, const at::Tensor& out) = 0;
  // dgate_up from dout (rows [T, F]) and the saved gate_up; may overwrite gate_up itself.
  virtual void SwiGluBackward(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& dgate_up) = 0;

  // Causal attention inside each document, scale 1 / sqrt(head_dim). qkv: rows [T, row_size] after RoPE; out: rows [T, q_size];
  // lse: [q_heads, T] acc, log-sum-exp of the scores. cu_seqlens: [documents + 1] from 0 to T.
  virtual void Attention(const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                         const at::Tensor& lse) = 0;
  // dqkv: rows [T, row_size], all written (before the inverse of RoPE).
  virtual void AttentionBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens,
                                 const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dqkv) = 0;

  // *loss_sum [1] fp64 += sum over rows of -log softmax(logits)[target]. With with_gradient logits become weight * (softmax - onehot), else they are
  // spoiled. logits: [N, V]; targets: [N] int64.
  virtual void CrossEntropy(const at::Tensor& logits, const at::Tensor& targets, double weight, bool with_gradient, const at::Tensor& loss_sum) = 0;

  // out = x with dropped elements 0 and kept ones scaled. x, out: rows [T, H]; out may be x.
  virtual void Dropout(const at::Tensor& x, const DropoutSequence& sequence, const at::Tensor& out) = 0;
  // dx += dropout's gradient: the same mask and scale on dout. rows [T, H].
  virtual void DropoutBackward(const at::Tensor& dout, const DropoutSequence& sequence, const at::Tensor& dx) = 0;
};

// The CPU's kernels: stateless, shared, usable from any thread.
Kernels& CpuKernels();

}  // namespace ppft::trainer
