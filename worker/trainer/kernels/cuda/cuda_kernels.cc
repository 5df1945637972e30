#include "worker/trainer/kernels/cuda/cuda_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAStream.h>

#include "common/data/philox.h"
#include "worker/trainer/cuda/attention.h"
#include "worker/trainer/kernels/cuda/launch.h"
#include "worker/trainer/kernels/cuda/tensor.h"

namespace ppft::trainer::cuda {
namespace {

DropoutNumbers NumbersOf(const DropoutSequence& sequence) {
  DropoutNumbers numbers;
  numbers.key[0] = sequence.key[0];
  numbers.key[1] = sequence.key[1];
  numbers.stream = sequence.stream;
  numbers.domain = static_cast<uint32_t>(data::PhiloxDomain::kDropout);
  numbers.threshold = static_cast<uint32_t>(sequence.p * 4294967296.0);
  numbers.scale = static_cast<float>(1.0 / (1.0 - sequence.p));
  return numbers;
}

class CudaKernels final : public Kernels {
 public:
  explicit CudaKernels(int device) : attention_(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device))) {}

  void MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) override {
    at::Tensor result = out;
    at::mm_out(result, a, b);
  }

  void AddRmsNorm(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps, const at::Tensor& sum, const at::Tensor& normed,
                  const at::Tensor& rstd) override {
    const int64_t rows = x.size(0), columns = x.size(1);
    const at::ScalarType type = x.scalar_type();
    cuda::AddRmsNorm(TypeOf(x), rows, columns, MatrixOf(x, type, rows, columns), delta.defined() ? MatrixOf(delta, type, rows, columns) : Matrix(),
                     Weight(weight, x), static_cast<float>(eps), delta.defined() ? MatrixOf(sum, type, rows, columns) : Matrix(),
                     MatrixOf(normed, type, rows, columns), Flat<float>(rstd, rows), Stream());
  }

  void ApplyRmsNorm(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& normed) override {
    const int64_t rows = x.size(0), columns = x.size(1);
    const at::ScalarType type = x.scalar_type();
    cuda::ApplyRmsNorm(TypeOf(x), rows, columns, MatrixOf(x, type, rows, columns), Flat<float>(rstd, rows), Weight(weight, x),
                       MatrixOf(normed, type, rows, columns), Stream());
  }

  void RmsNormBackward(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx) override {
    const int64_t rows = x.size(0), columns = x.size(1);
    const at::ScalarType type = x.scalar_type();
    cuda::RmsNormBackward(TypeOf(x), rows, columns, MatrixOf(dnormed, type, rows, columns), MatrixOf(x, type, rows, columns), Flat<float>(rstd, rows),
                          Weight(weight, x), MatrixOf(dx, type, rows, columns), Stream());
  }

  void Rope(const at::Tensor& qkv, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position, bool inverse) override {
    const int64_t rows = qkv.size(0), half = heads.head_dim / 2, positions = cos.size(0);
    const Matrix c = MatrixOf(cos, at::kFloat, positions, half), s = MatrixOf(sin, at::kFloat, positions, half);
    TORCH_CHECK(c.stride == s.stride, "rope: the tables differ in their strides");
    cuda::Rope(TypeOf(qkv), rows, static_cast<int>(heads.q_heads + heads.kv_heads), static_cast<int>(half),
               MatrixOf(qkv, qkv.scalar_type(), rows, heads.row_size()), static_cast<const float*>(c.data), static_cast<const float*>(s.data), c.stride,
               positions, Flat<int32_t>(position, rows), inverse, Stream());
  }

  void SwiGlu(const at::Tensor& gate_up, const at::Tensor& out) override {
    const int64_t rows = out.size(0), columns = out.size(1);
    const at::ScalarType type = out.scalar_type();
    cuda::SwiGlu(TypeOf(out), rows, columns, MatrixOf(gate_up, type, rows, 2 * columns), MatrixOf(out, type, rows, columns), Stream());
  }

  void SwiGluBackward(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& dgate_up) override {
    const int64_t rows = dout.size(0), columns = dout.size(1);
    const at::ScalarType type = dout.scalar_type();
    cuda::SwiGluBackward(TypeOf(dout), rows, columns, MatrixOf(dout, type, rows, columns), MatrixOf(gate_up, type, rows, 2 * columns),
                         MatrixOf(dgate_up, type, rows, 2 * columns), Stream());
  }

  void Attention(const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                 const at::Tensor& lse) override {
    attention_.Forward(qkv, heads, cu_seqlens, out, lse);
  }

  void AttentionBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu_seqlens, const at::Tensor& out,
                         const at::Tensor& lse, const at::Tensor& dqkv) override {
    attention_.Backward(dout, qkv, heads, cu_seqlens, out, lse, dqkv);
  }

  void CrossEntropy(const at::Tensor& logits, const at::Tensor& targets, double weight, bool with_gradient, const at::Tensor& loss_sum) override {
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    if (!row_losses_.defined() || row_losses_.size(0) < rows) row_losses_ = at::empty({rows}, logits.options().dtype(at::kDouble));
    cuda::CrossEntropy(TypeOf(logits), rows, vocab, MatrixOf(logits, logits.scalar_type(), rows, vocab), Flat<int64_t>(targets, rows), weight, with_gradient,
                       row_losses_.data_ptr<double>(), Flat<double>(loss_sum, 1), Stream());
  }

  void Dropout(const at::Tensor& x, const DropoutSequence& sequence, const at::Tensor& out) override {
    const int64_t rows = x.size(0), columns = x.size(1);
    const at::ScalarType type = x.scalar_type();
    cuda::Dropout(TypeOf(x), rows, columns, MatrixOf(x, type, rows, columns), NumbersOf(sequence), MatrixOf(out, type, rows, columns), Stream());
  }

  void DropoutBackward(const at::Tensor& dout, const DropoutSequence& sequence, const at::Tensor& dx) override {
    const int64_t rows = dx.size(0), columns = dx.size(1);
    const at::ScalarType type = dx.scalar_type();
    cuda::DropoutBackward(TypeOf(dx), rows, columns, MatrixOf(dout, type, rows, columns), NumbersOf(sequence), MatrixOf(dx, type, rows, columns), Stream());
  }

 private:
  static cudaStream_t Stream() { return c10::cuda::getCurrentCUDAStream(); }
  static const void* Weight(const at::Tensor& weight, const at::Tensor& like) {
    TORCH_CHECK(weight.is_cuda() && weight.is_contiguous() && weight.numel() == like.size(1) && weight.scalar_type() == like.scalar_type(),
                "rms norm: a weight of ", weight.sizes(), " for ", like.size(1), " columns");
    return weight.data_ptr();
  }

  cuda::Attention attention_;
  at::Tensor row_losses_;  // [rows] fp64
};

}  // namespace

std::unique_ptr<Kernels> MakeKernels(int device) { return std::make_unique<CudaKernels>(device); }

}  // namespace ppft::trainer::cuda
