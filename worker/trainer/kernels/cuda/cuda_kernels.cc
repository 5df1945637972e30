#include "worker/trainer/kernels/cuda/cuda_kernels.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAStream.h>

#include <exception>
#include <utility>

#include "common/data/philox.h"
#include "worker/trainer/cuda/attention.h"
#include "worker/trainer/cuda/product_tuner.h"
#include "worker/trainer/kernels/cuda/launch.h"
#include "worker/trainer/kernels/cuda/tensor.h"

namespace ppft::trainer::cuda {
namespace {

DropoutNumbers NumbersOf(const DropoutSequence& sequence, int64_t rows) {
  DropoutNumbers numbers;
  numbers.rows = sequence.rows.defined() ? reinterpret_cast<const uint4*>(Flat<int32_t>(sequence.rows, 4 * rows)) : nullptr;
  numbers.key[0] = sequence.key[0];
  numbers.key[1] = sequence.key[1];
  numbers.stream = sequence.stream;
  numbers.domain = static_cast<uint32_t>(data::PhiloxDomain::kDropout);
  numbers.threshold = static_cast<uint32_t>(sequence.p * 4294967296.0);
  numbers.scale = static_cast<float>(1.0 / (1.0 - sequence.p));
  return numbers;
}

class CapturedGraph final : public CapturedWork {
 public:
  explicit CapturedGraph(std::shared_ptr<int> alive) : alive_(std::move(alive)) { ++*alive_; }
  ~CapturedGraph() override { --*alive_; }
  void Launch() override { graph.replay(); }

  at::cuda::CUDAGraph graph;

 private:
  const std::shared_ptr<int> alive_;
};

class CudaKernels final : public Kernels {
 public:
  explicit CudaKernels(int device) : attention_(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device))) {}

  void MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) override {
    if (!at::globalContext().deterministicAlgorithms() && tuner_.Run(a, b, out)) return;
    at::Tensor result = out;
    at::mm_out(result, a, b);
  }
  void AddProduct(const at::Tensor& a, const at::Tensor& b, double alpha, const at::Tensor& sum) override {
    at::Tensor result = sum;
    if (sum.scalar_type() == a.scalar_type()) {
      result.addmm_(a, b, 1.0, alpha);
    } else {
      at::addmm_out(result, result, a, b, result.scalar_type(), 1.0, alpha);
    }
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
                          Weight(weight, x), MatrixOf(dx, type, rows, columns), Matrix(), Stream());
  }
  void RmsNormBackwardAndNormed(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx,
                                const at::Tensor& normed) override {
    const int64_t rows = x.size(0), columns = x.size(1);
    const at::ScalarType type = x.scalar_type();
    cuda::RmsNormBackward(TypeOf(x), rows, columns, MatrixOf(dnormed, type, rows, columns), MatrixOf(x, type, rows, columns), Flat<float>(rstd, rows),
                          Weight(weight, x), MatrixOf(dx, type, rows, columns), MatrixOf(normed, type, rows, columns), Stream());
  }

  void Rope(const at::Tensor& qkv, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position, bool inverse) override {
    const int64_t rows = qkv.size(0), half = heads.head_dim / 2, positions = cos.size(0);
    const Matrix c = MatrixOf(cos, at::kFloat, positions, half), s = MatrixOf(sin, at::kFloat, positions, half);
    TORCH_CHECK(c.stride == s.stride, "rope: the tables differ in their strides");
    cuda::Rope(TypeOf(qkv), rows, static_cast<int>(heads.q_heads + heads.kv_heads), static_cast<int>(half),
               MatrixOf(qkv, qkv.scalar_type(), rows, heads.row_size()), static_cast<const float*>(c.data), static_cast<const float*>(s.data), c.stride,
               positions, Flat<int32_t>(position, rows), inverse, Stream());
  }

  bool wants_parts() const override { return true; }
  void RopeToParts(const at::Tensor& rows, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position,
                   const QkvParts& parts) override {
    MoveParts(cuda::RopeToParts, rows, parts, heads, cos, sin, position);
  }
  void RopeFromParts(const QkvParts& parts, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position,
                     const at::Tensor& rows) override {
    const auto back = [](Type type, int64_t count, int half, Matrix packed, const Parts& from, auto... rest) {
      cuda::RopeFromParts(type, count, half, from, packed, rest...);
    };
    MoveParts(back, rows, parts, heads, cos, sin, position);
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
                         MatrixOf(dgate_up, type, rows, 2 * columns), Matrix(), Stream());
  }
  void SwiGluBackwardAndGated(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& gated) override {
    const int64_t rows = dout.size(0), columns = dout.size(1);
    const at::ScalarType type = dout.scalar_type();
    const Matrix both = MatrixOf(gate_up, type, rows, 2 * columns);
    cuda::SwiGluBackward(TypeOf(dout), rows, columns, MatrixOf(dout, type, rows, columns), both, both, MatrixOf(gated, type, rows, columns), Stream());
  }

  bool SwiGluBackwardSums(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& lora, const at::Tensor& d, double scale,
                          const at::Tensor& db_gate, const at::Tensor& db_up, const at::Tensor& da, const at::Tensor& room) override {
    const int64_t rows = dout.size(0), columns = dout.size(1), rank = d.size(1);
    const at::ScalarType type = dout.scalar_type();
    const Matrix o = MatrixOf(dout, type, rows, columns), both = MatrixOf(gate_up, type, rows, 2 * columns);
    const Matrix l = MatrixOf(lora, type, rows, 2 * rank), of_d = MatrixOf(d, type, rows, rank);
    if (!SwiGluBackwardSumsServes(TypeOf(dout), rows, columns, rank, o, both, l, of_d)) return false;
    const int64_t elements = SwiGluSumsElements(rows, columns);
    const bool fits =
        room.defined() && room.is_contiguous() && static_cast<int64_t>(room.nbytes()) >= elements * 4 && reinterpret_cast<uintptr_t>(room.data_ptr()) % 16 == 0;
    const at::Tensor partial = fits ? room : at::empty({elements}, dout.options().dtype(at::kFloat));
    cuda::SwiGluBackwardSums(TypeOf(dout), rows, columns, o, both, l, of_d, static_cast<float>(scale), static_cast<float*>(partial.data_ptr()),
                             Flat<float>(db_gate, columns * rank), Flat<float>(db_up, columns * rank), Flat<float>(da, columns * rank), Stream());
    return true;
  }

  void Attention(const at::Tensor& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse) override {
    attention_.Forward(Split(qkv, heads), heads, documents, out, lse);
  }
  void AttentionBackward(const at::Tensor& dout, const at::Tensor& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out,
                         const at::Tensor& lse, const at::Tensor& dqkv) override {
    const int64_t rows = dqkv.size(0);
    const at::ScalarType type = dqkv.scalar_type();
    const QkvParts gradients = PartsOf(at::empty({rows, heads.row_size()}, dqkv.options()), heads);
    attention_.Backward(dout, Split(qkv, heads), heads, documents, out, lse, gradients, at::Tensor());
    const Matrix parts[3] = {MatrixOf(gradients.q, type, rows, heads.q_size()), MatrixOf(gradients.k, type, rows, heads.kv_size()),
                             MatrixOf(gradients.v, type, rows, heads.kv_size())};
    const int64_t columns[3] = {heads.q_size(), heads.kv_size(), heads.kv_size()};
    JoinColumns(TypeOf(dqkv), rows, parts, columns, MatrixOf(dqkv, type, rows, heads.row_size()), Stream());
  }
  void AttentionOfParts(const QkvParts& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse) override {
    attention_.Forward(qkv, heads, documents, out, lse);
  }
  void AttentionBackwardOfParts(const at::Tensor& dout, const QkvParts& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out,
                                const at::Tensor& lse, const QkvParts& dqkv, const at::Tensor& room) override {
    attention_.Backward(dout, qkv, heads, documents, out, lse, dqkv, room);
  }
  std::vector<int32_t> DocumentTable(const std::vector<int32_t>& cu_seqlens, const HeadLayout& heads, int64_t out_stride) const override {
    return DocumentWords(cu_seqlens, heads, out_stride);
  }

  void CrossEntropy(const at::Tensor& logits, const at::Tensor& targets, const LossWeight& weight, bool with_gradient, const at::Tensor& loss_sum) override {
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    const at::Tensor row_losses = at::empty({rows}, logits.options().dtype(at::kDouble));
    cuda::CrossEntropy(TypeOf(logits), rows, vocab, MatrixOf(logits, logits.scalar_type(), rows, vocab), Flat<int64_t>(targets, rows),
                       static_cast<float>(weight.value), weight.device.defined() ? Flat<float>(weight.device, 1) : nullptr, with_gradient,
                       row_losses.data_ptr<double>(), Flat<double>(loss_sum, 1), Stream());
  }

  void SpreadRows(const at::Tensor& rows, const at::Tensor& row_of, const at::Tensor& out) override {
    const int64_t count = out.size(0), columns = out.size(1);
    cuda::SpreadRows(TypeOf(out), count, columns, MatrixOf(rows, out.scalar_type(), rows.size(0), columns), Flat<int32_t>(row_of, count),
                     MatrixOf(out, out.scalar_type(), count, columns), Stream());
  }

  void Dropout(const at::Tensor& x, const DropoutSequence& sequence, const at::Tensor& out) override {
    const int64_t rows = x.size(0), columns = x.size(1);
    const at::ScalarType type = x.scalar_type();
    cuda::Dropout(TypeOf(x), rows, columns, MatrixOf(x, type, rows, columns), NumbersOf(sequence, rows), MatrixOf(out, type, rows, columns), Stream());
  }

  void DropoutBackward(const at::Tensor& dout, const DropoutSequence& sequence, const at::Tensor& dx) override {
    const int64_t rows = dx.size(0), columns = dx.size(1);
    const at::ScalarType type = dx.scalar_type();
    cuda::DropoutBackward(TypeOf(dx), rows, columns, MatrixOf(dout, type, rows, columns), NumbersOf(sequence, rows), MatrixOf(dx, type, rows, columns),
                          Stream());
  }

  // All captured passes share a pool of memory: each is done with it when the next one begins.
  std::unique_ptr<CapturedWork> Capture(const std::function<void()>& work) override {
    if (*captured_ == 0) pool_ = at::cuda::graph_pool_handle();
    auto captured = std::make_unique<CapturedGraph>(captured_);
    captured->graph.capture_begin(pool_, cudaStreamCaptureModeThreadLocal);
    try {
      work();
    } catch (...) {
      try {
        captured->graph.capture_end();
      } catch (const std::exception&) {  // what work threw is the cause
      }
      cudaGetLastError();
      throw;
    }
    captured->graph.capture_end();
    return captured;
  }

 private:
  static cudaStream_t Stream() { return c10::cuda::getCurrentCUDAStream(); }
  static const void* Weight(const at::Tensor& weight, const at::Tensor& like) {
    TORCH_CHECK(weight.is_cuda() && weight.is_contiguous() && weight.numel() == like.size(1) && weight.scalar_type() == like.scalar_type(),
                "rms norm: a weight of ", weight.sizes(), " for ", like.size(1), " columns");
    return weight.data_ptr();
  }

  static QkvParts Split(const at::Tensor& qkv, const HeadLayout& heads) {
    MatrixOf(qkv, qkv.scalar_type(), qkv.size(0), heads.row_size());
    return {qkv.narrow(1, 0, heads.q_size()).contiguous(), qkv.narrow(1, heads.q_size(), heads.kv_size()).contiguous(),
            qkv.narrow(1, heads.q_size() + heads.kv_size(), heads.kv_size()).contiguous()};
  }
  template <typename Move>
  static void MoveParts(Move&& move, const at::Tensor& rows, const QkvParts& parts, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin,
                        const at::Tensor& position) {
    const int64_t count = rows.size(0), half = heads.head_dim / 2, positions = cos.size(0);
    const at::ScalarType type = rows.scalar_type();
    const Matrix c = MatrixOf(cos, at::kFloat, positions, half), s = MatrixOf(sin, at::kFloat, positions, half);
    TORCH_CHECK(c.stride == s.stride, "rope: the tables differ in their strides");
    const Parts all = {
        {MatrixOf(parts.q, type, count, heads.q_size()), MatrixOf(parts.k, type, count, heads.kv_size()), MatrixOf(parts.v, type, count, heads.kv_size())},
        {heads.q_size(), heads.kv_size(), heads.kv_size()}};
    move(TypeOf(rows), count, static_cast<int>(half), MatrixOf(rows, type, count, heads.row_size()), all, static_cast<const float*>(c.data),
         static_cast<const float*>(s.data), c.stride, positions, Flat<int32_t>(position, count), Stream());
  }

  cuda::Attention attention_;
  ProductTuner tuner_;
  const std::shared_ptr<int> captured_ = std::make_shared<int>(0);  // passes that live
  c10::MempoolId_t pool_;
};

}  // namespace

std::unique_ptr<Kernels> MakeKernels(int device) { return std::make_unique<CudaKernels>(device); }

}  // namespace ppft::trainer::cuda
