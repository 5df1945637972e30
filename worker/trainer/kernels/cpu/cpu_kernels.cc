#include "worker/trainer/kernels/cpu/cpu_kernels.h"

namespace ppft::trainer {
namespace {

class CpuKernelsImpl final : public Kernels {
 public:
  void MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) override { cpu::MatMul(a, b, out); }
  void AddRmsNorm(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps, const at::Tensor& sum, const at::Tensor& normed,
                  const at::Tensor& rstd) override {
    cpu::AddRmsNorm(x, delta, weight, eps, sum, normed, rstd);
  }
  void ApplyRmsNorm(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& normed) override {
    cpu::ApplyRmsNorm(x, rstd, weight, normed);
  }
  void RmsNormBackward(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx) override {
    cpu::RmsNormBackward(dnormed, x, rstd, weight, dx);
  }
  void Rope(const at::Tensor& qkv, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position, bool inverse) override {
    cpu::Rope(qkv, heads, cos, sin, position, inverse);
  }
  void SwiGlu(const at::Tensor& gate_up, const at::Tensor& out) override { cpu::SwiGlu(gate_up, out); }
  void SwiGluBackward(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& dgate_up) override { cpu::SwiGluBackward(dout, gate_up, dgate_up); }
  void Attention(const at::Tensor& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse) override {
    cpu::Attention(qkv, heads, documents.cu_seqlens, out, lse);
  }
  void AttentionBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out,
                         const at::Tensor& lse, const at::Tensor& dqkv) override {
    cpu::AttentionBackward(dout, qkv, heads, documents.cu_seqlens, out, lse, dqkv);
  }
  void CrossEntropy(const at::Tensor& logits, const at::Tensor& targets, const LossWeight& weight, bool with_gradient, const at::Tensor& loss_sum) override {
    cpu::CrossEntropy(logits, targets, weight.value, with_gradient, loss_sum);
  }
  void Dropout(const at::Tensor& x, const DropoutSequence& sequence, const at::Tensor& out) override { cpu::Dropout(x, sequence, out); }
  void DropoutBackward(const at::Tensor& dout, const DropoutSequence& sequence, const at::Tensor& dx) override { cpu::DropoutBackward(dout, sequence, dx); }
};

}  // namespace

Kernels& CpuKernels() {
  static CpuKernelsImpl* const kernels = new CpuKernelsImpl;  // never destroyed: no order at exit
  return *kernels;
}

}  // namespace ppft::trainer
