#include "worker/trainer/engine/adapter_state.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

int64_t SizeOf(const std::vector<ParameterSpan>& spans) {
  int64_t size = 0;
  for (const ParameterSpan& span : spans) size += span.size;
  return size;
}

}  // namespace

absl::StatusOr<std::unique_ptr<AdapterState>> AdapterState::Create(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages,
                                                                   Group* replicas) {
  std::vector<ParameterSpan> spans;
  for (StageModel* stage : stages) {
    for (const Parameter& parameter : stage->parameters()) {
      for (const at::Tensor& tensor : {parameter.master, parameter.gradient}) {
        if (!tensor.is_contiguous() || tensor.scalar_type() != at::kFloat || !tensor.device().is_cpu()) {
          return absl::InvalidArgumentError(absl::StrCat(parameter.name, ": masters and gradients must be contiguous fp32 in host memory"));
        }
      }
      spans.push_back({parameter.name, parameter.master.data_ptr<float>(), parameter.gradient.data_ptr<float>(), parameter.master.numel()});
    }
  }
  const bool sharded = zero_stage > 0 && replicas->size() > 1;
  std::vector<int64_t> bounds = replicas->EvenBounds(SizeOf(spans));
  return absl::WrapUnique(new AdapterState(options, sharded, std::move(stages), std::move(spans), std::move(bounds), replicas));
}

AdapterState::AdapterState(const AdamWOptions& options, bool sharded, std::vector<StageModel*> stages, std::vector<ParameterSpan> spans,
                           std::vector<int64_t> bounds, Group* replicas)
    : sharded_(sharded),
      stages_(std::move(stages)),
      spans_(std::move(spans)),
      bounds_(std::move(bounds)),
      replicas_(replicas),
      size_(SizeOf(spans_)),
      optimizer_(options, spans_, sharded ? bounds_[static_cast<size_t>(replicas->index())] : 0,
                 sharded ? bounds_[static_cast<size_t>(replicas->index()) + 1] : SizeOf(spans_)) {}

std::vector<float> AdapterState::Gathered(float* ParameterSpan::*where) const {
  std::vector<float> values(static_cast<size_t>(size_));
  float* out = values.data();
  for (const ParameterSpan& span : spans_) {
    std::copy(span.*where, span.*where + span.size, out);
    out += span.size;
  }
  return values;
}

void AdapterState::Scatter(const std::vector<float>& values, float* ParameterSpan::*where) {
  const float* in = values.data();
  for (const ParameterSpan& span : spans_) {
    std::copy(in, in + span.size, span.*where);
    in += span.size;
  }
}

absl::Status AdapterState::ReduceGradients() {
  if (replicas_->size() == 1) return absl::OkStatus();
  std::vector<float> values = Gathered(&ParameterSpan::gradient);
  if (sharded_) {
    PPFT_RETURN_IF_ERROR(replicas_->ReduceScatter(absl::MakeSpan(values), bounds_));
  } else {
    PPFT_RETURN_IF_ERROR(replicas_->AllReduceSum(absl::MakeSpan(values)));
  }
  Scatter(values, &ParameterSpan::gradient);
  return absl::OkStatus();
}

std::vector<double> AdapterState::SquaresOfGradients() const {
  std::vector<double> squares;
  squares.reserve(spans_.size());
  const bool counts = sharded_ || replicas_->index() == 0;
  int64_t offset = 0;
  for (const ParameterSpan& span : spans_) {
    const int64_t first = std::max(optimizer_.begin(), offset);
    const int64_t last = std::min(optimizer_.end(), offset + span.size);
    squares.push_back(counts && first < last ? SumOfSquares(span.gradient + (first - offset), last - first) : 0.0);
    offset += span.size;
  }
  return squares;
}

absl::Status AdapterState::Update(int64_t update, double learning_rate, double gradient_factor) {
  optimizer_.Step(update, learning_rate, gradient_factor);
  if (sharded_) {
    std::vector<float> values = Gathered(&ParameterSpan::master);
    PPFT_RETURN_IF_ERROR(replicas_->AllGather(absl::MakeSpan(values), bounds_));
    Scatter(values, &ParameterSpan::master);
  }
  MastersChanged();
  return absl::OkStatus();
}

void AdapterState::ZeroGradients() {
  for (StageModel* stage : stages_) stage->ZeroGradients();
}

void AdapterState::MastersChanged() {
  for (StageModel* stage : stages_) stage->AdapterChanged();
}

absl::StatusOr<std::vector<NamedTensor>> AdapterState::CheckpointTensors() {
  std::vector<NamedTensor> tensors;
  std::vector<Parameter> parameters;
  for (StageModel* stage : stages_) {
    for (const Parameter& parameter : stage->parameters()) parameters.push_back(parameter);
  }
  for (const Parameter& parameter : parameters) tensors.push_back({parameter.name, parameter.master});
  for (const auto& [prefix, moments] : {std::make_pair("exp_avg.", &optimizer_.exp_avg()), std::make_pair("exp_avg_sq.", &optimizer_.exp_avg_sq())}) {
    std::vector<float> whole(static_cast<size_t>(size_));
    std::copy(moments->begin(), moments->end(), whole.begin() + optimizer_.begin());
    if (sharded_) PPFT_RETURN_IF_ERROR(replicas_->AllGather(absl::MakeSpan(whole), bounds_));
    const float* in = whole.data();
    for (const Parameter& parameter : parameters) {
      at::Tensor copy = at::empty(parameter.master.sizes(), at::kFloat);
      std::copy(in, in + copy.numel(), copy.data_ptr<float>());
      in += copy.numel();
      tensors.push_back({absl::StrCat(prefix, parameter.name), copy});
    }
  }
  return tensors;
}

absl::StatusOr<std::vector<float>> AdapterState::ReadAll(const TensorSource& source, const std::string& prefix) const {
  std::vector<float> values;
  values.reserve(static_cast<size_t>(size_));
  for (StageModel* stage : stages_) {
    for (const Parameter& parameter : stage->parameters()) {
      const std::string name = absl::StrCat(prefix, parameter.name);
      PPFT_ASSIGN_OR_RETURN(const at::Tensor read, source(name));
      if (read.sizes() != parameter.master.sizes()) return absl::InvalidArgumentError(absl::StrCat(name, " has another shape than this job's adapter"));
      const at::Tensor tensor = read.to(at::kFloat).contiguous();
      const float* data = tensor.data_ptr<float>();
      if (!std::isfinite(SumOfSquares(data, tensor.numel()))) return absl::DataLossError(absl::StrCat(name, " holds a number that is not finite"));
      values.insert(values.end(), data, data + tensor.numel());
    }
  }
  return values;
}

absl::Status AdapterState::LoadMasters(const TensorSource& source) {
  return CatchTorch("adapter", [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> values, ReadAll(source, ""));
    SetMasters(values);
    return absl::OkStatus();
  });
}

absl::Status AdapterState::Restore(const TensorSource& source) {
  return CatchTorch("checkpoint", [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> masters, ReadAll(source, ""));
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> exp_avg, ReadAll(source, "exp_avg."));
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> exp_avg_sq, ReadAll(source, "exp_avg_sq."));
    std::copy(exp_avg.begin() + optimizer_.begin(), exp_avg.begin() + optimizer_.end(), optimizer_.exp_avg().begin());
    std::copy(exp_avg_sq.begin() + optimizer_.begin(), exp_avg_sq.begin() + optimizer_.end(), optimizer_.exp_avg_sq().begin());
    SetMasters(masters);
    return absl::OkStatus();
  });
}

absl::Status AdapterState::LoadBestFrom(const TensorSource& source) {
  return CatchTorch("best checkpoint", [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(best_, ReadAll(source, ""));
    return absl::OkStatus();
  });
}

std::vector<float> AdapterState::CopyMasters() const { return Gathered(&ParameterSpan::master); }

void AdapterState::SetMasters(const std::vector<float>& values) {
  Scatter(values, &ParameterSpan::master);
  MastersChanged();
}

}  // namespace ppft::trainer
