// The passes of a stage over a micro-batch.
#include "worker/trainer/model/llama_stage.h"

#include <ATen/Context.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {

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

void LlamaStage::EndSteps() {
  passes_.Clear();
  pool_->EndSteps();
  scratch_.EndSteps();
}

}  // namespace ppft::trainer
