#include "worker/trainer/engine/device_adapter_state.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {

absl::StatusOr<std::unique_ptr<AdapterState>> DeviceAdapterState::Create(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages,
                                                                         CudaRuntime* cuda, const DeviceReplicas& replicas, ReplicaExchange* exchange) {
  return CatchTorch("adapter", [&]() -> absl::StatusOr<std::unique_ptr<AdapterState>> {
    auto state = absl::WrapUnique(new DeviceAdapterState(options, zero_stage, std::move(stages), replicas));
    for (StageModel* stage : state->stages_) PPFT_RETURN_IF_ERROR(state->AddPart(stage, cuda, exchange));
    return std::unique_ptr<AdapterState>(std::move(state));
  });
}

DeviceAdapterState::DeviceAdapterState(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages, const DeviceReplicas& replicas)
    : AdapterState(std::move(stages)),
      options_(options),
      sharded_(zero_stage > 0 && replicas.comm != nullptr),
      gradients_sharded_(sharded_ && zero_stage >= 2),
      replicas_(replicas) {}

absl::Status DeviceAdapterState::AddPart(StageModel* stage, CudaRuntime* cuda, ReplicaExchange* exchange) {
  int64_t size = 0;
  for (const Parameter& parameter : stage->parameters()) size += parameter.master.numel();
  Part part;
  part.stage = stage;
  for (int i = 0; i <= replicas_.size; ++i) part.bounds.push_back(size * i / replicas_.size);
  if (gradients_sharded_) PPFT_RETURN_IF_ERROR(stage->ShardGradients(exchange, part.bounds));
  FlatParameters flat = stage->flat_parameters();
  if (gradients_sharded_) flat.gradient = stage->gradient_shard();
  if (sharded_) {
    flat.begin = begin(part);
    flat.end = part.bounds[static_cast<size_t>(replicas_.index) + 1];
  }
  part.master = flat.master;
  part.gradient = flat.gradient;
  part.spans = flat.spans;
  part.optimizer = cuda->MakeOptimizer(std::move(flat));
  parts_.push_back(std::move(part));
  return absl::OkStatus();
}

int64_t DeviceAdapterState::moment_bytes() const {
  int64_t bytes = 0;
  for (const Part& part : parts_) bytes += 2 * static_cast<int64_t>(part.optimizer->exp_avg().nbytes());
  return bytes;
}

absl::Status DeviceAdapterState::ReduceGradients() {
  if (replicas_.comm == nullptr || gradients_sharded_) return absl::OkStatus();
  return CatchTorch("gradients", [&]() -> absl::Status {
    for (const Part& part : parts_) {
      float* const values = part.gradient.data_ptr<float>();
      const uint64_t operation = sharded_ ? replicas_.comm->ReduceScatter(values, part.bounds) : replicas_.comm->AllReduceSum(values, part.gradient.numel());
      replicas_.comm->WaitOnStream(operation);
    }
    return absl::OkStatus();
  });
}

absl::StatusOr<std::vector<double>> DeviceAdapterState::Sums(const at::Tensor& loss_total) {
  return CatchTorch("", [&]() -> absl::StatusOr<std::vector<double>> {
    std::vector<at::Tensor> on_device = {loss_total.defined() ? loss_total : at::zeros({1}, parts_[0].master.options().dtype(at::kDouble))};
    for (const Part& part : parts_) on_device.push_back(part.optimizer->GradientSquares());
    const at::Tensor host = at::cat(on_device).to(at::kCPU);
    std::vector<double> sums(host.data_ptr<double>(), host.data_ptr<double>() + host.numel());
    if (!sharded_ && replicas_.index != 0) std::fill(sums.begin() + 1, sums.end(), 0.0);
    return sums;
  });
}

absl::Status DeviceAdapterState::Update(int64_t update, double learning_rate, double gradient_factor) {
  return CatchTorch("optimizer", [&]() -> absl::Status {
    for (const Part& part : parts_) {
      part.optimizer->Step(options_, update, learning_rate, gradient_factor);
      if (!sharded_) continue;
      Gather(part, part.master);
      part.optimizer->WriteCopies();
    }
    return absl::OkStatus();
  });
}

void DeviceAdapterState::Gather(const Part& part, const at::Tensor& values) {
  replicas_.comm->WaitOnStream(replicas_.comm->AllGather(values.data_ptr<float>(), part.bounds));
}

absl::StatusOr<std::vector<NamedTensor>> DeviceAdapterState::CheckpointTensors() {
  return CatchTorch("checkpoint", [&]() -> absl::StatusOr<std::vector<NamedTensor>> {
    const std::vector<Parameter> parameters = this->parameters();
    std::vector<NamedTensor> tensors;
    const auto append = [&](const std::string& prefix, const std::vector<at::Tensor>& flat) {
      const std::vector<float> values = ToHost(flat);
      const float* in = values.data();
      for (const Parameter& parameter : parameters) {
        at::Tensor copy = at::empty(parameter.master.sizes(), at::kFloat);
        std::copy(in, in + copy.numel(), copy.data_ptr<float>());
        in += copy.numel();
        tensors.push_back({absl::StrCat(prefix, parameter.name), copy});
      }
    };
    std::vector<at::Tensor> masters, exp_avg, exp_avg_sq;
    for (const Part& part : parts_) {
      masters.push_back(part.master);
      for (const auto& [moments, whole] : {std::make_pair(part.optimizer->exp_avg(), &exp_avg), std::make_pair(part.optimizer->exp_avg_sq(), &exp_avg_sq)}) {
        at::Tensor values = moments;
        if (sharded_) {
          values = at::zeros_like(part.master);
          values.narrow(0, begin(part), moments.numel()).copy_(moments);
          Gather(part, values);
        }
        whole->push_back(values);
      }
    }
    append("", masters);
    append("exp_avg.", exp_avg);
    append("exp_avg_sq.", exp_avg_sq);
    return tensors;
  });
}

std::vector<float> DeviceAdapterState::ToHost(const std::vector<at::Tensor>& flat) const {
  std::vector<float> values;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const at::Tensor host = flat[i].to(at::kCPU);
    for (const FlatSpan& span : parts_[i].spans) {
      const float* const data = host.data_ptr<float>() + span.offset;
      values.insert(values.end(), data, data + span.size);
    }
  }
  return values;
}

std::vector<at::Tensor> DeviceAdapterState::FromHost(const std::vector<float>& values) const {
  std::vector<at::Tensor> flat;
  const float* in = values.data();
  for (const Part& part : parts_) {
    const at::Tensor host = at::zeros({part.master.numel()}, at::kFloat);
    for (const FlatSpan& span : part.spans) {
      std::copy(in, in + span.size, host.data_ptr<float>() + span.offset);
      in += span.size;
    }
    flat.push_back(host.to(part.master.device()));
  }
  return flat;
}

std::vector<float> DeviceAdapterState::CopyMasters() const {
  std::vector<at::Tensor> masters;
  for (const Part& part : parts_) masters.push_back(part.master);
  return ToHost(masters);
}

void DeviceAdapterState::SetMasters(const std::vector<float>& values) {
  const std::vector<at::Tensor> flat = FromHost(values);
  for (size_t i = 0; i < parts_.size(); ++i) {
    parts_[i].master.copy_(flat[i]);
    parts_[i].optimizer->WriteCopies();
  }
}

void DeviceAdapterState::SetMoments(const std::vector<float>& exp_avg, const std::vector<float>& exp_avg_sq) {
  const std::vector<at::Tensor> first = FromHost(exp_avg);
  const std::vector<at::Tensor> second = FromHost(exp_avg_sq);
  for (size_t i = 0; i < parts_.size(); ++i) {
    const at::Tensor moments = parts_[i].optimizer->exp_avg();
    moments.copy_(first[i].narrow(0, begin(parts_[i]), moments.numel()));
    parts_[i].optimizer->exp_avg_sq().copy_(second[i].narrow(0, begin(parts_[i]), moments.numel()));
  }
}

}  // namespace ppft::trainer
