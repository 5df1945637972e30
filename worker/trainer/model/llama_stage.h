// StageModel of LlamaForCausalLM. What is loaded and held is in llama_stage_load.cc, the passes are in llama_stage.cc.
//
// Thread: one at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/model/config.h"
#include "worker/trainer/kernels/kernels.h"
#include "worker/trainer/model/activations.h"
#include "worker/trainer/model/captured_passes.h"
#include "worker/trainer/model/decoder_layer.h"
#include "worker/trainer/model/loss_head.h"
#include "worker/trainer/model/merged_stage.h"
#include "worker/trainer/model/microbatch_tensors.h"
#include "worker/trainer/model/rope.h"
#include "worker/trainer/model/sharded_gradients.h"
#include "worker/trainer/model/sharded_weights.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

class LlamaStage final : public StageModel {
 public:
  LlamaStage(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source);

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

}  // namespace ppft::trainer
