// One stage (contiguous layers) of a frozen Llama base model with LoRA adapters: explicit forward and backward, no autograd.
//
// Shapes: tokens = sum of the micro-batch's documents, hidden = config.hidden_size, vocab = config.vocab_size. Documents are concatenated
// without padding; attention never crosses a document's border and positions restart with each (cu_seqlens).
// Thread: one thread at a time. Errors: Status with the tensor's or module's name; libtorch's exceptions do not leave.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "common/model/inventory.h"

namespace ppft::trainer {

struct LoraOptions {
  int r = 16;
  double scale = 2.0;  // lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
  double dropout = 0.0;
  uint64_t seed = 42;
  std::vector<std::string> target_modules;  // "q_proj" …
};

struct StageOptions {
  int stage = 0;
  int first_layer = 0;
  int num_layers = 0;
  bool has_embedding = false;
  bool has_head = false;
  at::ScalarType compute = at::kFloat;  // of the base and the activations; adapters and their gradients stay fp32
  LoraOptions lora;
  int64_t head_chunk_rows = 256;  // rows of logits at a time: they have to stay in cache
};

// The raw tensor of that name from the base model (as on disk: fp32, bf16 or fp16); NOT_FOUND if it is not there. A stage keeps its source: a merge of a
// model computed in bf16 or fp16 reads the original weights again.
using TensorSource = std::function<absl::StatusOr<at::Tensor>(const std::string& name)>;

// The inputs of one micro-batch. All on the host; the stage moves what it needs.
struct MicrobatchInput {
  int64_t step = 0;                 // key of the dropout generator
  int microbatch = 0;               // index in the step over all replicas: key of the dropout generator and of the stored activations
  std::vector<int32_t> cu_seqlens;  // [documents + 1], from 0 to tokens
  at::Tensor ids;                   // [tokens] int64; first stage
  at::Tensor target_rows;           // [targets] int64: rows whose next token is supervised; last stage
  at::Tensor target_ids;            // [targets] int64: those next tokens
  double loss_weight = 1.0;         // gradient of the step's loss with respect to one target's -log p: loss_scale / supervised targets of the step
  bool training = true;             // adapter dropout is active; false in evaluation and verification
};

// One trainable tensor. `gradient` is fp32 and accumulates until ZeroGradients.
struct Parameter {
  std::string name;     // PEFT's key: "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
  at::Tensor master;    // fp32, A: [r, in], B: [out, r]
  at::Tensor gradient;  // same shape, fp32
};

class StageModel {
 public:
  static absl::StatusOr<std::unique_ptr<StageModel>> Create(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source);
  virtual ~StageModel() = default;

  // hidden_in: [tokens, hidden] (undefined on the first stage). Returns hidden_out [tokens, hidden]; on the last stage an undefined tensor, and
  // the loss sum (fp64 sum of -log p over the targets, unscaled) is added to *loss_sum; the head's gradient is computed in the same pass.
  // Keeps what backward needs under `microbatch` if keep_for_backward.
  virtual absl::StatusOr<at::Tensor> Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep_for_backward, double* loss_sum) = 0;

  // grad_out: [tokens, hidden] (undefined on the last stage). Returns grad_in [tokens, hidden] (undefined on the first stage); adds the adapters' gradients.
  virtual absl::StatusOr<at::Tensor> Backward(const MicrobatchInput& input, const at::Tensor& grad_out) = 0;

  // Logits [rows.size(), vocab] fp32 of the given rows; last stage, no gradient (verification, tests).
  virtual absl::StatusOr<at::Tensor> Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) = 0;

  // Fixed order: by layer, then q k v o gate up down, A before B. Masters may be written; AdapterChanged() then refreshes the compute copies.
  virtual std::vector<Parameter>& parameters() = 0;
  virtual void AdapterChanged() = 0;
  virtual void ZeroGradients() = 0;

  // The base model's own tensors in HF names with the adapter merged in: W + scale * B A in fp32, then cast to `dtype`. One call per tensor of this stage.
  virtual absl::Status ForEachMerged(at::ScalarType dtype, const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit) = 0;

  // Names and shapes of those calls, in their order.
  virtual std::vector<model::ExpectedTensor> merged_tensors() const = 0;

  virtual int64_t activation_bytes() const = 0;  // held now for backward
};

}  // namespace ppft::trainer
