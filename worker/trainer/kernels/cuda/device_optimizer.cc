#include "worker/trainer/kernels/cuda/device_optimizer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "worker/trainer/kernels/cuda/launch.h"
#include "worker/trainer/kernels/cuda/tensor.h"

namespace ppft::trainer::cuda {
namespace {

// A table on the device, made once.
template <typename T>
at::Tensor Upload(const std::vector<T>& items, const at::Device& device) {
  const int64_t bytes = static_cast<int64_t>(items.size() * sizeof(T));
  const at::Tensor table = at::empty({std::max<int64_t>(1, bytes)}, at::TensorOptions(at::kByte).device(device));
  if (bytes > 0) table.narrow(0, 0, bytes).copy_(at::from_blob(const_cast<T*>(items.data()), {bytes}, at::kByte));
  return table;
}

class DeviceOptimizerImpl final : public DeviceOptimizer {
 public:
  explicit DeviceOptimizerImpl(FlatParameters parameters) : parameters_(std::move(parameters)) {
    const FlatParameters& p = parameters_;
    const int64_t total = p.master.numel();
    Flat<float>(p.master, total);
    TORCH_CHECK(p.begin >= 0 && p.begin <= p.end && p.end <= total, "optimizer: the shard [", p.begin, ", ", p.end, ") is not in ", total, " elements");
    const bool whole = p.gradient.numel() == total;
    Flat<float>(p.gradient, whole ? total : p.end - p.begin);
    gradient_begin_ = whole ? 0 : p.begin;
    device_ = p.master.device();
    const c10::cuda::CUDAGuard guard(device_);

    std::vector<ComputeTarget> targets;
    std::vector<int32_t> target_of(p.spans.size(), -1);
    for (const ComputeCopy& copy : p.copies) {
      const FlatSpan& span = p.spans.at(copy.parameter);
      const at::Tensor& to = copy.destination;
      TORCH_CHECK(to.dim() == 2 && to.numel() == span.size && to.stride(1) == 1, "optimizer: a compute copy of shape ", to.sizes(), " for ", span.size,
                  " elements");
      TORCH_CHECK(targets.empty() || TypeOf(to) == type_, "optimizer: compute copies of one type only");
      TORCH_CHECK(target_of[copy.parameter] < 0, "optimizer: two compute copies of one parameter");
      type_ = TypeOf(to);
      target_of[copy.parameter] = static_cast<int32_t>(targets.size());
      targets.push_back({span.offset, to.data_ptr(), to.stride(0), static_cast<int32_t>(to.size(1)), static_cast<float>(copy.scale)});
    }

    std::vector<OptimizerChunk> shard, all;
    std::vector<int32_t> first = {0};
    for (size_t i = 0; i < p.spans.size(); ++i) {
      const FlatSpan& span = p.spans[i];
      TORCH_CHECK(span.offset >= 0 && span.size >= 0 && span.offset + span.size <= total && span.size <= INT32_MAX, "optimizer: a parameter at ", span.offset,
                  " with ", span.size, " elements");
      const auto cut = [&](int64_t begin, int64_t end, std::vector<OptimizerChunk>& chunks) {
        for (int64_t at = begin; at < end; at += kOptimizerChunk) {
          chunks.push_back({at, static_cast<int32_t>(std::min<int64_t>(kOptimizerChunk, end - at)), target_of[i]});
        }
      };
      cut(span.offset, span.offset + span.size, all);
      cut(std::max(p.begin, span.offset), std::min(p.end, span.offset + span.size), shard);
      first.push_back(static_cast<int32_t>(shard.size()));
    }
    num_shard_ = static_cast<int>(shard.size());
    num_all_ = static_cast<int>(all.size());
    shard_ = Upload(shard, device_);
    all_ = Upload(all, device_);
    first_ = Upload(first, device_);
    targets_ = Upload(targets, device_);
    const at::TensorOptions fp32 = p.master.options();
    exp_avg_ = at::zeros({p.end - p.begin}, fp32);
    exp_avg_sq_ = at::zeros({p.end - p.begin}, fp32);
    partial_ = at::empty({std::max<int64_t>(1, num_shard_)}, fp32.dtype(at::kDouble));
    squares_ = at::zeros({static_cast<int64_t>(p.spans.size())}, fp32.dtype(at::kDouble));
  }

  void Step(const AdamWOptions& options, int64_t update, double learning_rate, double gradient_factor) override {
    const double correction1 = 1.0 - std::pow(options.beta1, static_cast<double>(update));
    const double correction2 = 1.0 - std::pow(options.beta2, static_cast<double>(update));
    AdamWScalars s;
    s.decay = static_cast<float>(1.0 - learning_rate * options.weight_decay);
    s.one_minus_beta1 = static_cast<float>(1.0 - options.beta1);
    s.beta2 = static_cast<float>(options.beta2);
    s.one_minus_beta2 = static_cast<float>(1.0 - options.beta2);
    s.correction2_sqrt = static_cast<float>(std::sqrt(correction2));
    s.epsilon = static_cast<float>(options.epsilon);
    s.minus_step_size = static_cast<float>(-learning_rate / correction1);
    s.gradient_factor = static_cast<float>(gradient_factor);
    Run(shard_, num_shard_, &s);
  }

  void WriteCopies() override { Run(all_, num_all_, nullptr); }

  at::Tensor GradientSquares() override {
    const c10::cuda::CUDAGuard guard(device_);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    ChunkSquares(Table<OptimizerChunk>(shard_), num_shard_, parameters_.gradient.data_ptr<float>(), gradient_begin_, partial_.data_ptr<double>(), stream);
    SumChunks(partial_.data_ptr<double>(), Table<int32_t>(first_), static_cast<int>(parameters_.spans.size()), squares_.data_ptr<double>(), stream);
    return squares_;
  }

  at::Tensor exp_avg() override { return exp_avg_; }
  at::Tensor exp_avg_sq() override { return exp_avg_sq_; }

 private:
  template <typename T>
  static const T* Table(const at::Tensor& table) {
    return static_cast<const T*>(table.data_ptr());
  }

  void Run(const at::Tensor& chunks, int num_chunks, const AdamWScalars* scalars) {
    const c10::cuda::CUDAGuard guard(device_);
    AdamW(type_, Table<OptimizerChunk>(chunks), num_chunks, Table<ComputeTarget>(targets_), scalars, parameters_.master.data_ptr<float>(),
          parameters_.gradient.data_ptr<float>(), gradient_begin_, exp_avg_.data_ptr<float>(), exp_avg_sq_.data_ptr<float>(), parameters_.begin,
          c10::cuda::getCurrentCUDAStream());
  }

  const FlatParameters parameters_;
  at::Device device_ = at::kCPU;
  Type type_ = Type::kFloat;
  int64_t gradient_begin_ = 0;  // of the flat buffer's elements
  int num_shard_ = 0;
  int num_all_ = 0;
  at::Tensor shard_, all_, first_, targets_;  // tables
  at::Tensor exp_avg_, exp_avg_sq_;
  at::Tensor partial_;  // [chunks of the shard] fp64
  at::Tensor squares_;  // [spans] fp64
};

}  // namespace

std::unique_ptr<DeviceOptimizer> MakeDeviceOptimizer(FlatParameters parameters) { return std::make_unique<DeviceOptimizerImpl>(std::move(parameters)); }

}  // namespace ppft::trainer::cuda
