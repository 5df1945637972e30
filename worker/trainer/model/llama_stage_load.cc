// What a stage holds: base weights, adapters with their gradients, and their bytes.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/data/philox.h"
#include "common/model/inventory.h"
#include "common/model/memory.h"
#include "common/model/peft.h"
#include "worker/trainer/model/llama_stage.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

absl::Status CheckOptions(const model::ModelConfig& config, const StageOptions& options) {
  if (options.num_layers < 1 || options.first_layer < 0 || options.first_layer + options.num_layers > config.num_layers) {
    return absl::InvalidArgumentError(absl::StrCat("stage ", options.stage, ": layers ", options.first_layer, " to ",
                                                   options.first_layer + options.num_layers - 1, " are not in a model of ", config.num_layers));
  }
  for (const std::string& name : options.lora.target_modules) {
    const std::vector<std::string>& known = model::TargetModules();
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      return absl::InvalidArgumentError(absl::StrCat("target_modules: \"", name, "\" is none of the seven linear layers"));
    }
  }
  if (!options.lora.target_modules.empty() && options.lora.r < 1) return absl::InvalidArgumentError("r must be at least 1");
  if (options.lora.dropout < 0 || options.lora.dropout >= 1) return absl::InvalidArgumentError("lora_dropout must be at least 0 and below 1");
  return absl::OkStatus();
}

}  // namespace

LlamaStage::LlamaStage(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source)
    : config_(config),
      options_(options),
      source_(source),
      compute_(at::TensorOptions().dtype(options.compute).device(options.device)),
      acc_(options.compute == at::kDouble ? at::kDouble : at::kFloat),
      kernels_(options.kernels != nullptr ? *options.kernels : CpuKernels()),
      rope_(config, compute_.dtype(acc_)),
      scratch_(compute_, options.least_tokens, kernels_.wants_parts()),
      passes_(kernels_, options.capture && options.weights == WeightHome::kResident &&
                            !model::AttentionIsPlainProducts(static_cast<int64_t>(compute_.dtype().itemsize()), config.head_dim)) {}

absl::Status LlamaStage::Load() {
  layer_offset_ = {0};
  for (int i = 0; i < options_.num_layers; ++i) {
    layers_.push_back(std::make_unique<DecoderLayer>(config_, options_, options_.first_layer + i, compute_, kernels_));
    int64_t count = layer_offset_.back();
    for (LoraLinear* linear : layers_.back()->linears()) count += linear->parameter_count();
    layer_offset_.push_back(count);
  }
  masters_ = at::zeros({layer_offset_.back()}, compute_.dtype(acc_));
  gradients_ = at::zeros({layer_offset_.back()}, compute_.dtype(acc_));
  BindAdapters();
  PPFT_RETURN_IF_ERROR(LoadMatrices());
  InitializeAdapters();
  AdapterChanged();

  if (options_.has_embedding || (options_.has_head && config_.tie_word_embeddings)) {
    embedding_ = at::empty({config_.vocab_size, config_.hidden_size}, compute_);
    PPFT_RETURN_IF_ERROR(LoadBaseTensor(source_, model::kEmbeddingName, embedding_));
  }
  if (options_.has_head) {
    const at::Tensor norm = at::empty({config_.hidden_size}, compute_);
    PPFT_RETURN_IF_ERROR(LoadBaseTensor(source_, model::kFinalNormName, norm));
    at::Tensor weight = embedding_;
    if (!config_.tie_word_embeddings) {
      weight = at::empty({config_.vocab_size, config_.hidden_size}, compute_);
      PPFT_RETURN_IF_ERROR(LoadBaseTensor(source_, model::kHeadName, weight));
    }
    head_.emplace(norm, weight, config_.rms_norm_eps, options_.head_chunk_rows, kernels_);
    loss_total_ = at::zeros({1}, compute_.dtype(at::kDouble));
  }
  pool_ = std::make_unique<ActivationPool>(options_.num_layers, layers_[0]->sizes(), options_.checkpointing, compute_, acc_, options_.least_tokens);
  layout_ = {options_.device, layers_[0]->heads(), layers_[0]->sizes().attention, options_.token_multiple, options_.lora.seed, options_.lora.dropout > 0};
  for (const auto& layer : layers_) gradient_columns_ = std::max(gradient_columns_, layer->gradient_columns());
  return absl::OkStatus();
}

void LlamaStage::BindAdapters() {
  parameters_.clear();
  for (size_t i = 0; i < layers_.size(); ++i) {
    int64_t offset = layer_offset_[i];
    for (LoraLinear* linear : layers_[i]->linears()) {
      const int64_t size = linear->parameter_count();
      const at::Tensor gradient =
          gradients_.defined() ? gradients_.narrow(0, offset, size) : sharded_gradients_->OfLayer(i).narrow(0, offset - layer_offset_[i], size);
      linear->Bind(masters_.narrow(0, offset, size), gradient);
      offset += size;
      for (const LoraModule& m : linear->modules()) {
        if (!m.adapted) continue;
        const std::string& name = model::TargetModules()[m.index];
        const int64_t layer = options_.first_layer + static_cast<int64_t>(i);
        parameters_.push_back({model::PeftKey(layer, name, "lora_A"), m.a, gradients_.defined() ? m.a_gradient : at::Tensor()});
        parameters_.push_back({model::PeftKey(layer, name, "lora_B"), m.b, gradients_.defined() ? m.b_gradient : at::Tensor()});
      }
    }
  }
}

absl::Status LlamaStage::LoadMatrices() {
  const int64_t layer_size = layers_[0]->weight_size();
  if (options_.weights == WeightHome::kSharded) {
    sharded_ = std::make_unique<ShardedWeights>(layers_.size(), layer_size, options_.num_replicas, options_.replica, compute_);
  } else if (options_.weights == WeightHome::kStreamed) {
    streamed_ = at::zeros({layer_size}, compute_);
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (sharded_ != nullptr) layers_[i]->Place(sharded_->Buffer());
    if (streamed_.defined()) layers_[i]->Place(streamed_);
    PPFT_RETURN_IF_ERROR(layers_[i]->Load(source_));
    if (sharded_ != nullptr) sharded_->Keep(i);
  }
  return absl::OkStatus();
}

// PEFT's start: A by kaiming_uniform_(a = sqrt(5)), which is uniform in +-1 / sqrt(in); B zero. The numbers belong to (seed, layer, module), not to the stage.
void LlamaStage::InitializeAdapters() {
  for (size_t i = 0; i < layers_.size(); ++i) {
    for (LoraLinear* linear : layers_[i]->linears()) {
      const double bound = 1.0 / std::sqrt(static_cast<double>(linear->in()));
      for (const LoraModule& m : linear->modules()) {
        if (!m.adapted) continue;
        const uint32_t stream = static_cast<uint32_t>((options_.first_layer + static_cast<int64_t>(i)) * 8 + m.index);
        data::PhiloxStream random(options_.lora.seed, data::PhiloxDomain::kAdapterInit, stream);
        std::vector<float> values(m.a.numel());
        for (float& value : values) value = static_cast<float>(((random.Next() >> 8) * 0x1p-24 * 2.0 - 1.0) * bound);
        m.a.copy_(at::from_blob(values.data(), m.a.sizes(), at::kFloat));
      }
    }
  }
}

void LlamaStage::AdapterChanged() {
  const c10::InferenceMode guard;
  for (const auto& layer : layers_) {
    for (LoraLinear* linear : layer->linears()) linear->AdapterChanged();
  }
}

absl::Status LlamaStage::ShardGradients(ReplicaExchange* replicas, const std::vector<int64_t>& bounds) {
  return CatchTorch(Where(), [&]() -> absl::Status {
    gradients_ = at::Tensor();
    sharded_gradients_ = std::make_unique<ShardedGradients>(replicas, bounds, layer_offset_, compute_.dtype(acc_));
    BindAdapters();
    AdapterChanged();
    return absl::OkStatus();
  });
}

HeldBytes LlamaStage::held_bytes() const {
  const auto bytes = [](const at::Tensor& tensor) { return tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : int64_t{0}; };
  HeldBytes held;
  held.weights = bytes(embedding_) + bytes(streamed_) + (head_ && !config_.tie_word_embeddings ? bytes(head_->weight()) : 0);
  if (head_) held.weights += bytes(head_->norm());
  const auto element = static_cast<int64_t>(compute_.dtype().itemsize());
  for (const auto& layer : layers_) {
    held.weights += 2 * config_.hidden_size * element + (options_.weights == WeightHome::kResident ? layer->weight_size() * element : 0);
    if (acc_ == options_.compute) continue;
    for (LoraLinear* linear : layer->linears()) {
      if (linear->gradient_columns() == 0) held.masters += linear->lora_columns() * linear->in() * element;
    }
  }
  if (sharded_ != nullptr) held.weights += sharded_->held_bytes();
  held.masters += bytes(masters_);
  held.gradients = bytes(gradients_) + (sharded_gradients_ == nullptr ? 0 : sharded_gradients_->held_bytes());
  held.activations = pool_->held_bytes();
  held.scratch = scratch_.held_bytes();
  return held;
}

FlatParameters LlamaStage::flat_parameters() {
  FlatParameters flat;
  flat.master = masters_;
  flat.gradient = gradients_;
  flat.end = masters_.numel();
  for (const Parameter& parameter : parameters_) {
    flat.spans.push_back({parameter.master.data_ptr<float>() - masters_.data_ptr<float>(), parameter.master.numel()});
  }
  int64_t parameter = 0;
  for (const auto& layer : layers_) {
    for (LoraLinear* linear : layer->linears()) {
      for (ComputeCopy& copy : linear->compute_copies(parameter)) flat.copies.push_back(std::move(copy));
      for (const LoraModule& m : linear->modules()) parameter += m.adapted ? 2 : 0;
    }
  }
  return flat;
}

absl::StatusOr<std::unique_ptr<StageModel>> StageModel::Create(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source) {
  PPFT_RETURN_IF_ERROR(CheckOptions(config, options));
  return CatchTorch(absl::StrCat("stage ", options.stage), [&]() -> absl::StatusOr<std::unique_ptr<StageModel>> {
    auto stage = std::make_unique<LlamaStage>(config, options, source);
    PPFT_RETURN_IF_ERROR(stage->Load());
    return std::unique_ptr<StageModel>(std::move(stage));
  });
}

}  // namespace ppft::trainer
