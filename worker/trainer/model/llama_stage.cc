// StageModel of LlamaForCausalLM.
#include <ATen/Context.h>
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
#include "common/model/memory.h"
#include "common/model/peft.h"
#include "worker/trainer/model/activations.h"
#include "worker/trainer/model/captured_passes.h"
#include "worker/trainer/model/decoder_layer.h"
#include "worker/trainer/model/loss_head.h"
#include "worker/trainer/model/merged_stage.h"
#include "worker/trainer/model/rope.h"
#include "worker/trainer/model/sharded_gradients.h"
#include "worker/trainer/model/sharded_weights.h"
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
        compute_(at::TensorOptions().dtype(options.compute).device(options.device)),
        acc_(options.compute == at::kDouble ? at::kDouble : at::kFloat),
        kernels_(options.kernels != nullptr ? *options.kernels : CpuKernels()),
        rope_(config, compute_.dtype(acc_)),
        scratch_(compute_, options.least_tokens, kernels_.wants_parts()),
        passes_(kernels_, options.capture && options.weights == WeightHome::kResident &&
                              !model::AttentionIsPlainProducts(static_cast<int64_t>(compute_.dtype().itemsize()), config.head_dim)) {}

  absl::Status Load();
  absl::Status Idle(bool backward) override;
  void Attach(ReplicaExchange* replicas) override {
    if (sharded_ != nullptr) sharded_->Attach(replicas);
  }
  absl::Status ShardGradients(ReplicaExchange* replicas, const std::vector<int64_t>& bounds) override;
  at::Tensor gradient_shard() override { return sharded_gradients_ == nullptr ? at::Tensor() : sharded_gradients_->shard(); }
  HeldBytes held_bytes() const override;
  absl::StatusOr<at::Tensor> Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep_for_backward, double* loss_sum) override;
  absl::StatusOr<at::Tensor> Backward(const MicrobatchInput& input, const at::Tensor& grad_out) override;
  absl::StatusOr<at::Tensor> Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) override;

  std::vector<Parameter>& parameters() override { return parameters_; }
  void AdapterChanged() override;
  void ZeroGradients() override { (sharded_gradients_ == nullptr ? gradients_ : sharded_gradients_->shard()).zero_(); }
  FlatParameters flat_parameters() override;
  at::Tensor loss_total() override { return loss_total_; }
  absl::Status ForEachMerged(at::ScalarType dtype, const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit) override;
  std::vector<model::ExpectedTensor> merged_tensors() const override { return MergedTensorsOf(Parts()); }
  int64_t activation_bytes() const override { return pool_->kept_bytes(); }
  void EndSteps() override;
  int64_t captured_launches() const override { return passes_.launches(); }

 private:
  // The residual stream after the last layer: base + delta.
  struct Residual {
    at::Tensor base, delta;  // [tokens, hidden]
  };

  std::string Where() const { return absl::StrCat("stage ", options_.stage); }
  void InitializeAdapters();
  void BindAdapters();
  absl::Status LoadMatrices();
  // Before layer i computes; `next` (or -1) computes after it.
  absl::Status UseLayer(size_t i, int next);
  StageParts Parts() const { return {config_, options_, source_, embedding_, layers_, head_ ? &*head_ : nullptr}; }
  absl::Status CheckInput(const MicrobatchInput& input, const at::Tensor& hidden_in) const;
  // The micro-batch's numbers and its rows at the stage's entry.
  void Prepare(const MicrobatchInput& input, const at::Tensor& hidden_in, MicrobatchActivations& saved);
  absl::StatusOr<Residual> RunLayers(MicrobatchActivations& saved);
  Residual ResidualOf(MicrobatchActivations& saved);  // that RunLayers left
  at::Tensor RunHead(MicrobatchActivations& saved, bool keep_for_backward);
  absl::Status RunBackward(MicrobatchActivations& saved, const at::Tensor& dhidden);
  // Of the gradient of the stage's output, in scratch.
  at::Tensor GradientRows(int64_t tokens);
  LayerPass PassOf(const MicrobatchActivations& saved) { return {saved.microbatch, rope_, scratch_}; }
  PassKey KeyOf(int what, const MicrobatchActivations& saved) const;
  int64_t generation() const { return scratch_.generation() + pool_->generation() + rope_.generation() + moves_; }

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

  std::unique_ptr<ShardedWeights> sharded_;  // WeightHome::kSharded
  at::Tensor streamed_;                      // kStreamed: one layer's matrices

  at::Tensor masters_;                 // [parameters] acc
  at::Tensor gradients_;               // [parameters] acc; undefined when they are shared out
  std::vector<int64_t> layer_offset_;  // [layers + 1]: where a layer's parameters begin
  std::unique_ptr<ShardedGradients> sharded_gradients_;
  at::Tensor loss_total_;  // [1] fp64; last stage
  std::vector<Parameter> parameters_;
  MicrobatchLayout layout_;
  int64_t gradient_columns_ = 0;  // of the rows of dhidden behind `hidden`
  int64_t moves_ = 0;             // of the micro-batches' blocks
  RopeTable rope_;
  Scratch scratch_;
  std::unique_ptr<ActivationPool> pool_;
  CapturedPasses passes_;
};

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

void LlamaStage::EndSteps() {
  passes_.Clear();
  pool_->EndSteps();
  scratch_.EndSteps();
}

absl::Status LlamaStage::UseLayer(size_t i, int next) {
  if (sharded_ != nullptr) {
    PPFT_ASSIGN_OR_RETURN(const at::Tensor weights, sharded_->Use(static_cast<int>(i), next));
    layers_[i]->Place(weights);
  } else if (streamed_.defined()) {
    layers_[i]->Place(streamed_);
    return layers_[i]->Load(source_);
  }
  return absl::OkStatus();
}

// The same gatherings and sums as for a micro-batch with tokens, without the computation.
absl::Status LlamaStage::Idle(bool backward) {
  return CatchTorch(Where(), [&]() -> absl::Status {
    const c10::InferenceMode guard;
    const int count = static_cast<int>(layers_.size());
    for (int n = 0; n < count; ++n) {
      const int i = backward ? count - 1 - n : n;
      const int next = n + 1 == count ? -1 : backward ? i - 1 : i + 1;
      if (sharded_ != nullptr) PPFT_RETURN_IF_ERROR(sharded_->Use(i, next).status());
      if (!backward || sharded_gradients_ == nullptr) continue;
      sharded_gradients_->Begin(static_cast<size_t>(i));
      PPFT_RETURN_IF_ERROR(sharded_gradients_->Sum(static_cast<size_t>(i)));
    }
    return sharded_gradients_ == nullptr ? absl::OkStatus() : sharded_gradients_->EndSum();
  });
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

absl::Status LlamaStage::CheckInput(const MicrobatchInput& input, const at::Tensor& hidden_in) const {
  if (input.cu_seqlens.size() < 2 || input.cu_seqlens.front() != 0 || !std::is_sorted(input.cu_seqlens.begin(), input.cu_seqlens.end()) ||
      input.cu_seqlens.back() < 1) {
    return absl::InvalidArgumentError("cu_seqlens must rise from 0 to the number of tokens");
  }
  const int64_t tokens = input.cu_seqlens.back();
  int64_t merged = 0;
  for (const MergedMicrobatch& part : input.merged) merged += part.tokens;
  if (!input.merged.empty() && merged != tokens) {
    return absl::InvalidArgumentError(absl::StrCat("merged micro-batches of ", merged, " tokens must be the ", tokens, " tokens of cu_seqlens"));
  }
  if (options_.has_embedding ? !input.ids.defined() || input.ids.numel() != tokens
                             : !hidden_in.defined() || hidden_in.dim() != 2 || hidden_in.size(0) != tokens || hidden_in.size(1) != config_.hidden_size) {
    return absl::InvalidArgumentError(absl::StrCat(options_.has_embedding ? "ids" : "hidden_in", " must hold the ", tokens, " tokens of cu_seqlens"));
  }
  return absl::OkStatus();
}

void LlamaStage::Prepare(const MicrobatchInput& input, const at::Tensor& hidden_in, MicrobatchActivations& saved) {
  MicrobatchTensors& microbatch = saved.microbatch;
  if (FillMicrobatch(layout_, kernels_, input, saved.capacity, &microbatch)) ++moves_;
  rope_.Reserve(std::max(microbatch.longest, options_.least_tokens));
  at::Tensor real = saved.layers[0].hidden.narrow(0, 0, microbatch.real_tokens);
  if (options_.has_embedding) {
    at::index_select_out(real, embedding_, 0, microbatch.ids);
  } else {
    real.copy_(hidden_in);
  }
  const int64_t padding = microbatch.tokens - microbatch.real_tokens;
  if (padding > 0) saved.layers[0].hidden.narrow(0, microbatch.real_tokens, padding).zero_();
}

absl::StatusOr<LlamaStage::Residual> LlamaStage::RunLayers(MicrobatchActivations& saved) {
  const int64_t tokens = saved.microbatch.tokens;
  at::Tensor base = saved.layers[0].hidden.narrow(0, 0, tokens);
  at::Tensor delta;
  const LayerPass pass = PassOf(saved);
  for (size_t i = 0; i < layers_.size(); ++i) {
    PPFT_RETURN_IF_ERROR(UseLayer(i, i + 1 < layers_.size() ? static_cast<int>(i) + 1 : -1));
    const LayerActivations rows = pool_->Rows(saved, i, tokens);
    delta = layers_[i]->Forward(pass, base, delta, rows);
    base = rows.middle;
  }
  return Residual{base, delta};
}

LlamaStage::Residual LlamaStage::ResidualOf(MicrobatchActivations& saved) {
  const int64_t tokens = saved.microbatch.tokens;
  return {pool_->Rows(saved, layers_.size() - 1, tokens).middle, scratch_.Get(Scratch::kBlockOut, tokens, config_.hidden_size)};
}

PassKey LlamaStage::KeyOf(int what, const MicrobatchActivations& saved) const {
  const MicrobatchTensors& microbatch = saved.microbatch;
  return {what,
          reinterpret_cast<int64_t>(&saved),
          microbatch.tokens,
          microbatch.document_capacity,
          microbatch.longest,
          microbatch.uniform,
          microbatch.targets,
          microbatch.training ? 1 : 0,
          at::globalContext().deterministicAlgorithms() ? 1 : 0};
}

at::Tensor LlamaStage::RunHead(MicrobatchActivations& saved, bool keep_for_backward) {
  const MicrobatchTensors& microbatch = saved.microbatch;
  const Residual out = ResidualOf(saved);
  const at::Tensor gradient = keep_for_backward ? saved.head_gradient.narrow(0, 0, microbatch.targets) : at::Tensor();
  return head_->Forward(out.base, out.delta, microbatch.target_rows, microbatch.target_ids, microbatch.loss_weight, gradient, scratch_);
}

absl::StatusOr<at::Tensor> LlamaStage::Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep_for_backward, double* loss_sum) {
  return CatchTorch(Where(), [&]() -> absl::StatusOr<at::Tensor> {
    const c10::InferenceMode guard;
    PPFT_RETURN_IF_ERROR(CheckInput(input, hidden_in));
    const int64_t capacity = PaddedTokens(layout_, input);
    MicrobatchActivations& saved = keep_for_backward ? pool_->Keep(input.microbatch, capacity) : pool_->Transient(capacity);
    Prepare(input, hidden_in, saved);
    const MicrobatchTensors& microbatch = saved.microbatch;
    // The layers wait for nobody where a pass may be captured, and cannot fail there but by an exception.
    const auto layers = [&]() -> absl::Status { return RunLayers(saved).status(); };
    PPFT_RETURN_IF_ERROR(keep_for_backward ? passes_.Run(KeyOf(0, saved), generation(), layers, [this] { return generation(); }) : layers());
    if (!head_) {
      const Residual out = ResidualOf(saved);
      return at::add(out.base.narrow(0, 0, microbatch.real_tokens), out.delta.narrow(0, 0, microbatch.real_tokens));
    }
    if (microbatch.targets == 0) return at::Tensor();
    if (keep_for_backward && (!saved.head_gradient.defined() || saved.head_gradient.size(0) < microbatch.targets)) {
      saved.head_gradient.reset();
      saved.head_gradient = at::empty({std::max(microbatch.targets, options_.least_tokens), config_.hidden_size}, compute_);
      ++moves_;
    }
    if (loss_sum != nullptr) {
      const at::Tensor sum = RunHead(saved, keep_for_backward);
      *loss_sum += sum.item<double>();
      return at::Tensor();
    }
    const auto head = [&]() -> absl::Status {
      loss_total_.add_(RunHead(saved, keep_for_backward));
      return absl::OkStatus();
    };
    PPFT_RETURN_IF_ERROR(keep_for_backward ? passes_.Run(KeyOf(1, saved), generation(), head, [this] { return generation(); }) : head());
    return at::Tensor();
  });
}

at::Tensor LlamaStage::GradientRows(int64_t tokens) {
  return scratch_.Get(Scratch::kHiddenGradient, tokens, config_.hidden_size + gradient_columns_).narrow(1, 0, config_.hidden_size);
}

absl::Status LlamaStage::RunBackward(MicrobatchActivations& saved, const at::Tensor& dhidden) {
  const int64_t tokens = saved.microbatch.tokens;
  if (head_) {
    const int64_t targets = saved.microbatch.targets;
    if (targets == 0) {
      dhidden.zero_();
    } else {
      kernels_.SpreadRows(saved.head_gradient.narrow(0, 0, targets), saved.microbatch.target_of, dhidden);
    }
  }
  const LayerPass pass = PassOf(saved);
  for (size_t i = layers_.size(); i-- > 0;) {
    PPFT_RETURN_IF_ERROR(UseLayer(i, static_cast<int>(i) - 1));
    const LayerActivations rows = pool_->Rows(saved, i, tokens);
    if (options_.checkpointing == model::ActivationCheckpointing::kFull) layers_[i]->Recompute(pass, rows);
    if (options_.checkpointing == model::ActivationCheckpointing::kSelective) layers_[i]->RecomputeGateUp(pass, rows);
    if (sharded_gradients_ != nullptr) sharded_gradients_->Begin(i);
    layers_[i]->Backward(pass, rows, dhidden, /*input_gradient=*/i > 0 || !options_.has_embedding);
    if (sharded_gradients_ != nullptr) PPFT_RETURN_IF_ERROR(sharded_gradients_->Sum(i));
  }
  return sharded_gradients_ == nullptr ? absl::OkStatus() : sharded_gradients_->EndSum();
}

absl::StatusOr<at::Tensor> LlamaStage::Backward(const MicrobatchInput& input, const at::Tensor& grad_out) {
  return CatchTorch(Where(), [&]() -> absl::StatusOr<at::Tensor> {
    const c10::InferenceMode guard;
    MicrobatchActivations* saved = pool_->FindKept(input.microbatch);
    if (saved == nullptr)
      return absl::FailedPreconditionError(absl::StrCat(Where(), ": micro-batch ", input.microbatch, " has no forward pass to go back through"));
    const MicrobatchTensors& microbatch = saved->microbatch;
    const int64_t real = microbatch.real_tokens;
    // A captured pass, and one whose rows are wider or more than the caller's, works in scratch; nobody takes the first stage's gradient away.
    const bool in_scratch = options_.has_embedding || options_.capture || gradient_columns_ > 0 || microbatch.tokens > real;
    const at::Tensor dhidden = in_scratch ? GradientRows(microbatch.tokens) : at::empty({real, config_.hidden_size}, compute_);
    if (!head_) {
      if (!grad_out.defined() || grad_out.dim() != 2 || grad_out.size(0) != real || grad_out.size(1) != config_.hidden_size) {
        return absl::InvalidArgumentError(absl::StrCat(Where(), ": grad_out must be [tokens, hidden]"));
      }
      dhidden.narrow(0, 0, real).copy_(grad_out);
      if (microbatch.tokens > real) dhidden.narrow(0, real, microbatch.tokens - real).zero_();
    }
    const auto backward = [&]() -> absl::Status { return RunBackward(*saved, dhidden); };
    if (sharded_gradients_ == nullptr) {
      PPFT_RETURN_IF_ERROR(passes_.Run(KeyOf(2, *saved), generation(), backward, [this] { return generation(); }));
    } else {
      PPFT_RETURN_IF_ERROR(backward());
    }
    pool_->Release(input.microbatch);
    if (options_.has_embedding) return at::Tensor();
    return in_scratch ? dhidden.narrow(0, 0, real).clone(at::MemoryFormat::Contiguous) : dhidden;
  });
}

absl::StatusOr<at::Tensor> LlamaStage::Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) {
  return CatchTorch(Where(), [&]() -> absl::StatusOr<at::Tensor> {
    const c10::InferenceMode guard;
    if (!head_) return absl::FailedPreconditionError(absl::StrCat(Where(), " has no head"));
    PPFT_RETURN_IF_ERROR(CheckInput(input, hidden_in));
    MicrobatchActivations& saved = pool_->Transient(PaddedTokens(layout_, input));
    Prepare(input, hidden_in, saved);
    PPFT_ASSIGN_OR_RETURN(const Residual out, RunLayers(saved));
    std::vector<int64_t> copy = rows;
    const at::Tensor index = at::from_blob(copy.data(), {static_cast<int64_t>(copy.size())}, at::kLong).to(options_.device);
    return head_->Logits(out.base, out.delta, index, scratch_).to(at::kCPU);
  });
}

absl::Status LlamaStage::ForEachMerged(at::ScalarType dtype, const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit) {
  return CatchTorch(Where(), [&]() -> absl::Status {
    const c10::InferenceMode guard;
    return ForEachMergedTensor(Parts(), dtype, visit);
  });
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
