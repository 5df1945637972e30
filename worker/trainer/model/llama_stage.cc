// StageModel of LlamaForCausalLM.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/data/philox.h"
#include "common/model/inventory.h"
#include "common/model/peft.h"
#include "worker/trainer/model/activations.h"
#include "worker/trainer/model/decoder_layer.h"
#include "worker/trainer/model/loss_head.h"
#include "worker/trainer/model/rope.h"
#include "worker/trainer/model/stage_model.h"
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

class LlamaStage final : public StageModel {
 public:
  LlamaStage(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source)
      : config_(config),
        options_(options),
        source_(source),
        compute_(at::TensorOptions().dtype(options.compute)),
        acc_(options.compute == at::kDouble ? at::kDouble : at::kFloat),
        kernels_(CpuKernels()),
        rope_(config, compute_.dtype(acc_)),
        scratch_(compute_) {}

  absl::Status Load();
  absl::StatusOr<at::Tensor> Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep_for_backward, double* loss_sum) override;
  absl::StatusOr<at::Tensor> Backward(const MicrobatchInput& input, const at::Tensor& grad_out) override;
  absl::StatusOr<at::Tensor> Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) override;

  std::vector<Parameter>& parameters() override { return parameters_; }
  void AdapterChanged() override;
  void ZeroGradients() override { gradients_.zero_(); }
  absl::Status ForEachMerged(at::ScalarType dtype, const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit) override;
  std::vector<model::ExpectedTensor> merged_tensors() const override;
  int64_t activation_bytes() const override { return pool_->kept_bytes(); }

 private:
  // The residual stream after the last layer: base + delta.
  struct Residual {
    at::Tensor base, delta;  // [tokens, hidden]
  };

  std::string Where() const { return absl::StrCat("stage ", options_.stage); }
  void InitializeAdapters();
  absl::Status CheckInput(const MicrobatchInput& input, const at::Tensor& hidden_in) const;
  Residual RunLayers(const MicrobatchInput& input, const at::Tensor& hidden_in, MicrobatchActivations& saved);
  LayerPass PassOf(const MicrobatchInput& input, const MicrobatchActivations& saved) { return {input, rope_, saved.position, scratch_}; }

  // Constant after Load.
  const model::ModelConfig config_;
  const StageOptions options_;
  const TensorSource source_;
  const at::TensorOptions compute_;
  const at::ScalarType acc_;
  Kernels& kernels_;
  at::Tensor embedding_;  // [vocab, hidden]; first stage
  std::vector<std::unique_ptr<DecoderLayer>> layers_;
  std::optional<LossHead> head_;

  at::Tensor masters_;    // [parameters] acc
  at::Tensor gradients_;  // [parameters] acc
  std::vector<Parameter> parameters_;
  RopeTable rope_;
  Scratch scratch_;
  std::unique_ptr<ActivationPool> pool_;
};

absl::Status LlamaStage::Load() {
  int64_t count = 0;
  for (int i = 0; i < options_.num_layers; ++i) {
    layers_.push_back(std::make_unique<DecoderLayer>(config_, options_, options_.first_layer + i, compute_, kernels_));
    PPFT_RETURN_IF_ERROR(layers_.back()->Load(source_));
    for (LoraLinear* linear : layers_.back()->linears()) count += linear->parameter_count();
  }
  masters_ = at::zeros({count}, compute_.dtype(acc_));
  gradients_ = at::zeros({count}, compute_.dtype(acc_));
  int64_t offset = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    for (LoraLinear* linear : layers_[i]->linears()) {
      const int64_t size = linear->parameter_count();
      linear->Bind(masters_.narrow(0, offset, size), gradients_.narrow(0, offset, size));
      offset += size;
      for (const LoraModule& m : linear->modules()) {
        if (!m.adapted) continue;
        const std::string& name = model::TargetModules()[m.index];
        const int64_t layer = options_.first_layer + static_cast<int64_t>(i);
        parameters_.push_back({model::PeftKey(layer, name, "lora_A"), m.a, m.a_gradient});
        parameters_.push_back({model::PeftKey(layer, name, "lora_B"), m.b, m.b_gradient});
      }
    }
  }
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
  }
  pool_ = std::make_unique<ActivationPool>(options_.num_layers, layers_[0]->sizes(), compute_, acc_);
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

absl::Status LlamaStage::CheckInput(const MicrobatchInput& input, const at::Tensor& hidden_in) const {
  if (input.cu_seqlens.size() < 2 || input.cu_seqlens.front() != 0 || !std::is_sorted(input.cu_seqlens.begin(), input.cu_seqlens.end()) ||
      input.cu_seqlens.back() < 1) {
    return absl::InvalidArgumentError("cu_seqlens must rise from 0 to the number of tokens");
  }
  const int64_t tokens = input.cu_seqlens.back();
  if (options_.has_embedding ? !input.ids.defined() || input.ids.numel() != tokens
                             : !hidden_in.defined() || hidden_in.dim() != 2 || hidden_in.size(0) != tokens || hidden_in.size(1) != config_.hidden_size) {
    return absl::InvalidArgumentError(absl::StrCat(options_.has_embedding ? "ids" : "hidden_in", " must hold the ", tokens, " tokens of cu_seqlens"));
  }
  return absl::OkStatus();
}

LlamaStage::Residual LlamaStage::RunLayers(const MicrobatchInput& input, const at::Tensor& hidden_in, MicrobatchActivations& saved) {
  const int64_t tokens = input.cu_seqlens.back();
  std::vector<int32_t> position(tokens);
  int32_t longest = 0;
  for (size_t d = 0; d + 1 < input.cu_seqlens.size(); ++d) {
    for (int32_t t = input.cu_seqlens[d]; t < input.cu_seqlens[d + 1]; ++t) position[t] = t - input.cu_seqlens[d];
    longest = std::max(longest, input.cu_seqlens[d + 1] - input.cu_seqlens[d]);
  }
  saved.position = at::empty({tokens}, at::kInt);
  std::copy(position.begin(), position.end(), saved.position.data_ptr<int32_t>());
  rope_.Reserve(longest);

  at::Tensor base = saved.layers[0].hidden.narrow(0, 0, tokens);
  if (options_.has_embedding) {
    at::index_select_out(base, embedding_, 0, input.ids);
  } else {
    base.copy_(hidden_in);
  }
  at::Tensor delta;
  const LayerPass pass = PassOf(input, saved);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const LayerActivations rows = saved.layers[std::min(i, saved.layers.size() - 1)].Rows(tokens);
    delta = layers_[i]->Forward(pass, base, delta, rows);
    base = rows.middle;
  }
  return {base, delta};
}

absl::StatusOr<at::Tensor> LlamaStage::Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep_for_backward, double* loss_sum) {
  return CatchTorch(Where(), [&]() -> absl::StatusOr<at::Tensor> {
    const c10::InferenceMode guard;
    PPFT_RETURN_IF_ERROR(CheckInput(input, hidden_in));
    const int64_t tokens = input.cu_seqlens.back();
    MicrobatchActivations& saved = keep_for_backward ? pool_->Keep(input.microbatch, tokens) : pool_->Transient(tokens);
    const Residual out = RunLayers(input, hidden_in, saved);
    if (!head_) return at::add(out.base, out.delta);
    at::Tensor gradient;
    if (keep_for_backward) {
      saved.target_rows = input.target_rows;
      saved.head_gradient = at::empty({input.target_rows.size(0), config_.hidden_size}, compute_);
      gradient = saved.head_gradient;
    }
    head_->Forward(out.base, out.delta, input.target_rows, input.target_ids, input.loss_weight, gradient, scratch_, loss_sum);
    return at::Tensor();
  });
}

absl::StatusOr<at::Tensor> LlamaStage::Backward(const MicrobatchInput& input, const at::Tensor& grad_out) {
  return CatchTorch(Where(), [&]() -> absl::StatusOr<at::Tensor> {
    const c10::InferenceMode guard;
    MicrobatchActivations* saved = pool_->FindKept(input.microbatch);
    if (saved == nullptr)
      return absl::FailedPreconditionError(absl::StrCat(Where(), ": micro-batch ", input.microbatch, " has no forward pass to go back through"));
    const int64_t tokens = input.cu_seqlens.back();
    // On the first stage nobody takes the gradient away, so it may live in scratch.
    at::Tensor dhidden =
        options_.has_embedding ? scratch_.Get(Scratch::kHiddenGradient, tokens, config_.hidden_size) : at::empty({tokens, config_.hidden_size}, compute_);
    if (head_) {
      dhidden.zero_();
      dhidden.index_copy_(0, saved->target_rows, saved->head_gradient);
    } else {
      if (grad_out.sizes() != dhidden.sizes()) return absl::InvalidArgumentError(absl::StrCat(Where(), ": grad_out must be [tokens, hidden]"));
      dhidden.copy_(grad_out);
    }
    const LayerPass pass = PassOf(input, *saved);
    for (size_t i = layers_.size(); i-- > 0;) {
      layers_[i]->Backward(pass, saved->layers[i].Rows(tokens), dhidden, /*input_gradient=*/i > 0 || !options_.has_embedding);
    }
    pool_->Release(input.microbatch);
    return options_.has_embedding ? at::Tensor() : dhidden;
  });
}

absl::StatusOr<at::Tensor> LlamaStage::Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) {
  return CatchTorch(Where(), [&]() -> absl::StatusOr<at::Tensor> {
    const c10::InferenceMode guard;
    if (!head_) return absl::FailedPreconditionError(absl::StrCat(Where(), " has no head"));
    PPFT_RETURN_IF_ERROR(CheckInput(input, hidden_in));
    const Residual out = RunLayers(input, hidden_in, pool_->Transient(input.cu_seqlens.back()));
    std::vector<int64_t> copy = rows;
    return head_->Logits(out.base, out.delta, at::from_blob(copy.data(), {static_cast<int64_t>(copy.size())}, at::kLong), scratch_);
  });
}

absl::Status LlamaStage::ForEachMerged(at::ScalarType dtype, const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit) {
  return CatchTorch(Where(), [&]() -> absl::Status {
    const c10::InferenceMode guard;
    // A narrow compute copy has lost digits that the file on disk may have.
    const auto original = [&](const std::string& name, const at::Tensor& held) -> absl::StatusOr<at::Tensor> {
      if (held.scalar_type() == acc_) return held;
      return source_(name);
    };
    const auto plain = [&](const std::string& name, const at::Tensor& held) -> absl::Status {
      PPFT_ASSIGN_OR_RETURN(const at::Tensor base, original(name, held));
      return visit(name, base.to(dtype).contiguous());
    };
    if (options_.has_embedding) PPFT_RETURN_IF_ERROR(plain(model::kEmbeddingName, embedding_));
    for (const auto& layer : layers_) {
      for (const DecoderLayer::BaseTensor& tensor : layer->base_tensors()) {
        if (tensor.linear == nullptr) {
          PPFT_RETURN_IF_ERROR(plain(tensor.name, tensor.weight));
          continue;
        }
        PPFT_ASSIGN_OR_RETURN(const at::Tensor base, original(tensor.name, tensor.weight));
        PPFT_RETURN_IF_ERROR(visit(tensor.name, tensor.linear->Merged(tensor.module, base).to(dtype).contiguous()));
      }
    }
    if (head_) {
      PPFT_RETURN_IF_ERROR(plain(model::kFinalNormName, head_->norm()));
      if (!config_.tie_word_embeddings) PPFT_RETURN_IF_ERROR(plain(model::kHeadName, head_->weight()));
    }
    return absl::OkStatus();
  });
}

std::vector<model::ExpectedTensor> LlamaStage::merged_tensors() const {
  std::vector<model::ExpectedTensor> tensors;
  const std::vector<int64_t> vocabulary = {config_.vocab_size, config_.hidden_size};
  if (options_.has_embedding) tensors.push_back({model::kEmbeddingName, vocabulary});
  for (const auto& layer : layers_) {
    for (const DecoderLayer::BaseTensor& tensor : layer->base_tensors()) tensors.push_back({tensor.name, tensor.weight.sizes().vec()});
  }
  if (options_.has_head) {
    tensors.push_back({model::kFinalNormName, {config_.hidden_size}});
    if (!config_.tie_word_embeddings) tensors.push_back({model::kHeadName, vocabulary});
  }
  return tensors;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageModel>> StageModel::Create(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source) {
  PPFT_RETURN_IF_ERROR(CheckOptions(config, options));
  return CatchTorch(absl::StrCat("stage ", options.stage), [&]() -> absl::StatusOr<std::unique_ptr<StageModel>> {
    auto stage = std::make_unique<LlamaStage>(config, options, source);
    PPFT_RETURN_IF_ERROR(stage->Load());
    return std::unique_ptr<StageModel>(std::move(stage));
  });
}

}  // namespace ppft::trainer
