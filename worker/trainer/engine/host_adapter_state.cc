#include "worker/trainer/engine/host_adapter_state.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::trainer {
namespace {

int64_t SizeOf(const std::vector<ParameterSpan>& spans) {
  int64_t size = 0;
  for (const ParameterSpan& span : spans) size += span.size;
  return size;
}

// A stage's parameters in the order in which they lie in its flat buffers; their own order if it has none.
std::vector<size_t> FlatOrder(StageModel& stage) {
  const std::vector<FlatSpan> flat = stage.flat_parameters().spans;
  std::vector<size_t> order(stage.parameters().size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (flat.size() == order.size()) std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return flat[a].offset < flat[b].offset; });
  return order;
}

// Gradients move into the stages' shards: owned parts point there, the whole ones are gone.
absl::Status ShardGradients(const std::vector<StageModel*>& stages, const std::vector<int64_t>& bounds, ReplicaExchange* exchange,
                            std::vector<ParameterSpan>* spans, std::vector<ParameterSpan>* owned) {
  size_t span = 0;
  int64_t offset = 0;
  for (StageModel* stage : stages) {
    int64_t size = 0;
    for (size_t i = 0; i < stage->parameters().size(); ++i) size += (*spans)[span + i].size;
    std::vector<int64_t> own_bounds;
    for (const int64_t bound : bounds) own_bounds.push_back(std::clamp(bound, offset, offset + size) - offset);
    PPFT_RETURN_IF_ERROR(stage->ShardGradients(exchange, own_bounds));
    float* gradient = stage->gradient_shard().data_ptr<float>();
    for (size_t i = 0; i < stage->parameters().size(); ++i, ++span) {
      (*spans)[span].gradient = nullptr;
      (*owned)[span].gradient = gradient;
      gradient += (*owned)[span].size;
    }
    offset += size;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<AdapterState>> HostAdapterState::Create(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages,
                                                                       Group* replicas, ReplicaExchange* exchange) {
  std::vector<ParameterSpan> spans;
  std::vector<size_t> position;  // of each parameter among the spans
  for (StageModel* stage : stages) {
    const size_t first = spans.size();
    position.resize(first + stage->parameters().size());
    for (const size_t index : FlatOrder(*stage)) {
      const Parameter& parameter = stage->parameters()[index];
      for (const at::Tensor& tensor : {parameter.master, parameter.gradient}) {
        if (!tensor.is_contiguous() || tensor.scalar_type() != at::kFloat || !tensor.device().is_cpu()) {
          return absl::InvalidArgumentError(absl::StrCat(parameter.name, ": masters and gradients must be contiguous fp32 in host memory"));
        }
      }
      position[first + index] = spans.size();
      spans.push_back({parameter.name, parameter.master.data_ptr<float>(), parameter.gradient.data_ptr<float>(), parameter.master.numel()});
    }
  }
  const bool sharded = zero_stage > 0 && replicas->size() > 1;
  std::vector<int64_t> bounds = replicas->EvenBounds(SizeOf(spans));
  const int64_t begin = sharded ? bounds[static_cast<size_t>(replicas->index())] : 0;
  const int64_t end = sharded ? bounds[static_cast<size_t>(replicas->index()) + 1] : SizeOf(spans);
  std::vector<ParameterSpan> owned;
  int64_t offset = 0;
  for (const ParameterSpan& span : spans) {
    const int64_t first = std::clamp(begin, offset, offset + span.size), last = std::clamp(end, offset, offset + span.size);
    owned.push_back({span.name, span.master + (first - offset), span.gradient + (first - offset), last - first});
    offset += span.size;
  }
  if (sharded && zero_stage >= 2) PPFT_RETURN_IF_ERROR(ShardGradients(stages, bounds, exchange, &spans, &owned));
  return absl::WrapUnique(
      new HostAdapterState(options, zero_stage, std::move(stages), std::move(spans), std::move(owned), std::move(position), std::move(bounds), replicas));
}

HostAdapterState::HostAdapterState(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages, std::vector<ParameterSpan> spans,
                                   std::vector<ParameterSpan> owned, std::vector<size_t> position, std::vector<int64_t> bounds, Group* replicas)
    : AdapterState(std::move(stages)),
      sharded_(zero_stage > 0 && replicas->size() > 1),
      gradients_sharded_(sharded_ && zero_stage >= 2),
      spans_(std::move(spans)),
      owned_(std::move(owned)),
      position_(std::move(position)),
      bounds_(std::move(bounds)),
      replicas_(replicas),
      size_(SizeOf(spans_)),
      optimizer_(options, owned_, 0, SizeOf(owned_)) {}

std::vector<float> HostAdapterState::Gathered(float* ParameterSpan::*where) const {
  std::vector<float> values(static_cast<size_t>(size_));
  float* out = values.data();
  for (const ParameterSpan& span : spans_) {
    std::copy(span.*where, span.*where + span.size, out);
    out += span.size;
  }
  return values;
}

void HostAdapterState::Scatter(const std::vector<float>& values, float* ParameterSpan::*where) {
  const float* in = values.data();
  for (const ParameterSpan& span : spans_) {
    std::copy(in, in + span.size, span.*where);
    in += span.size;
  }
}

absl::Status HostAdapterState::ReduceGradients() {
  if (replicas_->size() == 1 || gradients_sharded_) return absl::OkStatus();
  std::vector<float> values = Gathered(&ParameterSpan::gradient);
  if (sharded_) {
    PPFT_RETURN_IF_ERROR(replicas_->ReduceScatter(absl::MakeSpan(values), bounds_));
  } else {
    PPFT_RETURN_IF_ERROR(replicas_->AllReduceSum(absl::MakeSpan(values)));
  }
  Scatter(values, &ParameterSpan::gradient);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> HostAdapterState::Sums(const at::Tensor& loss_total) {
  std::vector<double> sums;
  sums.reserve(spans_.size() + 1);
  sums.push_back(loss_total.defined() ? *loss_total.data_ptr<double>() : 0.0);
  const bool counts = sharded_ || replicas_->index() == 0;
  for (const size_t at : position_) sums.push_back(counts && owned_[at].size > 0 ? SumOfSquares(owned_[at].gradient, owned_[at].size) : 0.0);
  return sums;
}

absl::Status HostAdapterState::Update(int64_t update, double learning_rate, double gradient_factor) {
  optimizer_.Step(update, learning_rate, gradient_factor);
  if (sharded_) {
    std::vector<float> values = Gathered(&ParameterSpan::master);
    PPFT_RETURN_IF_ERROR(replicas_->AllGather(absl::MakeSpan(values), bounds_));
    Scatter(values, &ParameterSpan::master);
  }
  MastersChanged();
  return absl::OkStatus();
}

void HostAdapterState::MastersChanged() {
  for (StageModel* stage : stages_) stage->AdapterChanged();
}

absl::StatusOr<std::vector<NamedTensor>> HostAdapterState::CheckpointTensors() {
  std::vector<NamedTensor> tensors;
  const std::vector<Parameter> parameters = this->parameters();
  for (const Parameter& parameter : parameters) tensors.push_back({parameter.name, parameter.master});
  for (const auto& [prefix, moments] : {std::make_pair("exp_avg.", &optimizer_.exp_avg()), std::make_pair("exp_avg_sq.", &optimizer_.exp_avg_sq())}) {
    std::vector<float> whole(static_cast<size_t>(size_));
    std::copy(moments->begin(), moments->end(), whole.begin() + begin());
    if (sharded_) PPFT_RETURN_IF_ERROR(replicas_->AllGather(absl::MakeSpan(whole), bounds_));
    whole = Reordered(whole, /*to_flat=*/false);
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

std::vector<float> HostAdapterState::Reordered(const std::vector<float>& values, bool to_flat) const {
  std::vector<int64_t> begin(spans_.size() + 1, 0);
  for (size_t i = 0; i < spans_.size(); ++i) begin[i + 1] = begin[i] + spans_[i].size;
  std::vector<float> out(values.size());
  int64_t offset = 0;  // in the parameters' order
  for (const size_t at : position_) {
    const int64_t from = to_flat ? offset : begin[at], to = to_flat ? begin[at] : offset;
    std::copy_n(values.begin() + from, spans_[at].size, out.begin() + to);
    offset += spans_[at].size;
  }
  return out;
}

void HostAdapterState::SetMoments(const std::vector<float>& exp_avg, const std::vector<float>& exp_avg_sq) {
  const std::vector<float> first = Reordered(exp_avg, /*to_flat=*/true), second = Reordered(exp_avg_sq, /*to_flat=*/true);
  std::copy_n(first.begin() + begin(), optimizer_.exp_avg().size(), optimizer_.exp_avg().begin());
  std::copy_n(second.begin() + begin(), optimizer_.exp_avg_sq().size(), optimizer_.exp_avg_sq().begin());
}

std::vector<float> HostAdapterState::CopyMasters() const { return Reordered(Gathered(&ParameterSpan::master), /*to_flat=*/false); }

void HostAdapterState::SetMasters(const std::vector<float>& values) {
  Scatter(Reordered(values, /*to_flat=*/true), &ParameterSpan::master);
  MastersChanged();
}

}  // namespace ppft::trainer
