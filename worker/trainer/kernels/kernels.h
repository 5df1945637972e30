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
#include <functional>
#include <memory>
#include <utility>
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
  // [rows, 4] int32 on the kernels' device, read when the kernel runs: for each row the two words of its key, the number that it draws as, and nothing. In
  // place of `key` and the row's own number. Undefined: those.
  at::Tensor rows = {};
};

// The documents of a micro-batch, concatenated.
struct Documents {
  Documents() = default;
  Documents(std::vector<int32_t> cu) : cu_seqlens(std::move(cu)) {}  // NOLINT: cu_seqlens are documents

  std::vector<int32_t> cu_seqlens;  // [documents + 1] from 0 to T
  // What Kernels::DocumentTable made of them, on the kernels' device; its address may be all that a captured pass knows of them. Undefined: made in each call.
  at::Tensor table;
};

// q, k, v apart: [T, q_size] and twice [T, kv_size], contiguous.
struct QkvParts {
  at::Tensor q, k, v;
};
// The parts one after another in the memory of `block` ([T, row_size], contiguous).
QkvParts PartsOf(const at::Tensor& block, const HeadLayout& heads);

// The gradient of the loss with respect to one target's -log p.
struct LossWeight {
  LossWeight(double weight) : value(weight) {}  // NOLINT: a weight is a number

  double value = 1.0;
  at::Tensor device;  // [1] fp32 on the kernels' device, read when the kernel runs. On the CPU undefined
};

// Launches that were recorded once, to be repeated as a whole on the current stream: on the same addresses, with what lies there now.
class CapturedWork {
 public:
  virtual ~CapturedWork() = default;
  virtual void Launch() = 0;
};

class Kernels {
 public:
  virtual ~Kernels() = default;

  // out = a b, for products with a stored weight. a: rows [M, K]; b: [K, N], a matrix or its transpose; out: rows [M, N]. By default ATen's mm.
  virtual void MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);
  // sum += alpha * a b, in sum's type (acc); sum: [M, N] contiguous.
  virtual void AddProduct(const at::Tensor& a, const at::Tensor& b, double alpha, const at::Tensor& sum);

  // sum = x + delta (sum may be x; without delta x is read and sum ignored); rstd[t] = 1 / sqrt(mean(sum[t]^2) + eps); normed = sum * rstd * weight.
  // x, delta, sum: [T, H]; weight: [H]; normed: rows [T, H]; rstd: [T] acc. RMSNorm: 1910.07467.
  virtual void AddRmsNorm(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps, const at::Tensor& sum, const at::Tensor& normed,
                          const at::Tensor& rstd) = 0;
  // normed = x * rstd * weight: what AddRmsNorm wrote, made again for the backward pass.
  virtual void ApplyRmsNorm(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& normed) = 0;
  // dx += gradient of the norm; the weight is frozen. dnormed: rows [T, H].
  virtual void RmsNormBackward(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx) = 0;
  // RmsNormBackward and ApplyRmsNorm in one pass. normed: rows [T, H], may be dnormed.
  virtual void RmsNormBackwardAndNormed(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx,
                                        const at::Tensor& normed);

  // Rotates q and k of the packed rows in place, halves paired as Hugging Face's Llama does (column i with i + head_dim / 2).
  // qkv: rows [T, row_size]; cos, sin: [positions, head_dim / 2] acc; position: [T] int32. inverse: the transpose, for gradients.
  virtual void Rope(const at::Tensor& qkv, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position, bool inverse) = 0;

  // out = silu(gate) * up (SwiGLU, 2002.05202). gate_up: [T, 2F] = [gate | up]; out: rows [T, F].
  virtual void SwiGlu(const at::Tensor& gate_up, const at::Tensor& out) = 0;
  // dgate_up from dout (rows [T, F]) and the saved gate_up; may overwrite gate_up itself.
  virtual void SwiGluBackward(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& dgate_up) = 0;
  // Both in one pass: gated (rows [T, F]; may be dout where wants_parts()) is what SwiGlu gives, gate_up becomes its gradient.
  virtual void SwiGluBackwardAndGated(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& gated);

  // SwiGluBackward in place together with the sums over rows that adapters on gate, up and down want, where the device has that; false: nothing was done.
  // lora: rows [T, 2 r], d: rows [T, r]. Adds to db_gate and db_up ([F, r] acc) scale * the gradients of gate and up, transposed, times lora's halves, and to
  // da ([r, F] acc) d, transposed, times SwiGlu's output. room: contiguous memory that may be overwritten.
  virtual bool SwiGluBackwardSums(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& lora, const at::Tensor& d, double scale,
                                  const at::Tensor& db_gate, const at::Tensor& db_up, const at::Tensor& da, const at::Tensor& room);

  // Causal attention inside each document, scale 1 / sqrt(head_dim). qkv: rows [T, row_size] after RoPE; out: rows [T, q_size];
  // lse: [q_heads, T] acc, log-sum-exp of the scores.
  virtual void Attention(const at::Tensor& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse) = 0;
  // dqkv: rows [T, row_size], all written (before the inverse of RoPE).
  virtual void AttentionBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out,
                                 const at::Tensor& lse, const at::Tensor& dqkv) = 0;

  // Devices whose attention wants q, k, v apart say so and have these four: RoPE from rows into parts, its transpose from parts into rows, attention between
  // parts.
  virtual bool wants_parts() const { return false; }
  virtual void RopeToParts(const at::Tensor& rows, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position,
                           const QkvParts& parts);
  virtual void RopeFromParts(const QkvParts& parts, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position,
                             const at::Tensor& rows);
  virtual void AttentionOfParts(const QkvParts& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse);
  // room: contiguous memory that may be overwritten, for a workspace; or undefined.
  virtual void AttentionBackwardOfParts(const at::Tensor& dout, const QkvParts& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out,
                                        const at::Tensor& lse, const QkvParts& dqkv, const at::Tensor& room);
  // The words of Documents::table, whose number depends on the documents' rounded up to a power of two; empty where attention needs none. out_stride: of the
  // rows of Attention's out.
  virtual std::vector<int32_t> DocumentTable(const std::vector<int32_t>& cu_seqlens, const HeadLayout& heads, int64_t out_stride) const;

  // *loss_sum [1] fp64 += sum over rows of -log softmax(logits)[target]. With with_gradient logits become weight * (softmax - onehot), else they are
  // spoiled. logits: [N, V]; targets: [N] int64; a row with target -1 counts for nothing and its gradient is 0 (not on the CPU).
  virtual void CrossEntropy(const at::Tensor& logits, const at::Tensor& targets, const LossWeight& weight, bool with_gradient, const at::Tensor& loss_sum) = 0;

  // out[t] = rows[row_of[t]], 0 where that is negative. rows: [N, H], out: [T, H] contiguous; row_of: [T] int32.
  virtual void SpreadRows(const at::Tensor& rows, const at::Tensor& row_of, const at::Tensor& out);

  // out = x with dropped elements 0 and kept ones scaled. x, out: rows [T, H]; out may be x.
  virtual void Dropout(const at::Tensor& x, const DropoutSequence& sequence, const at::Tensor& out) = 0;
  // dx += dropout's gradient: the same mask and scale on dout. rows [T, H].
  virtual void DropoutBackward(const at::Tensor& dout, const DropoutSequence& sequence, const at::Tensor& dx) = 0;

  // Records what `work` launches on the current stream without doing it; null where that is not possible. Everything that work needs for the first time (plans,
  // workspaces) has to be there: do it once before. What work throws is thrown.
  virtual std::unique_ptr<CapturedWork> Capture(const std::function<void()>& work);
};

// The CPU's kernels: stateless, shared, usable from any thread.
Kernels& CpuKernels();

}  // namespace ppft::trainer
