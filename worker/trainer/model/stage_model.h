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
#include "common/model/memory.h"
#include "worker/trainer/kernels/kernels.h"
#include "worker/trainer/kernels/optimizer.h"
#include "worker/trainer/model/replica_exchange.h"

namespace ppft::trainer {

struct LoraOptions {
  int r = 16;
  double scale = 2.0;  // lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
  double dropout = 0.0;
  uint64_t seed = 42;
  std::vector<std::string> target_modules;  // "q_proj" …
};

// Where the frozen matrices of the layers lie.
enum class WeightHome {
  kResident,  // all of them in memory
  kSharded,   // ZeRO 3: each replica keeps a part, and a layer is gathered just before it is used
  kStreamed,  // one layer at a time, read from the source just before it is used
};

struct StageOptions {
  int stage = 0;
  int first_layer = 0;
  int num_layers = 0;
  bool has_embedding = false;
  bool has_head = false;
  at::Device device = at::kCPU;         // where weights, adapters and activations live
  Kernels* kernels = nullptr;           // of that device; null: the CPU's. Outlives the stage
  at::ScalarType compute = at::kFloat;  // of the base and the activations; adapters and their gradients stay fp32
  LoraOptions lora;
  model::ActivationCheckpointing checkpointing = model::ActivationCheckpointing::kNone;
  WeightHome weights = WeightHome::kResident;
  int num_replicas = 1;  // kSharded: of this stage, and which of them this one is
  int replica = 0;
  int64_t head_chunk_rows = 256;  // rows of logits at a time: on the CPU they have to stay in cache
  int64_t least_tokens = 0;       // buffers are made for micro-batches of so many tokens from the start
  int64_t token_multiple = 1;     // micro-batches are padded to a multiple of so many tokens and targets, so that few shapes occur
  // Passes whose shapes come again are captured and then launched as a whole, where `kernels` can. The results are the same to the bit.
  bool capture = false;
};

// The raw tensor of that name from the base model (as on disk: fp32, bf16 or fp16); NOT_FOUND if it is not there. A stage keeps its source: a merge of a
// model computed in bf16 or fp16 reads the original weights again.
using TensorSource = std::function<absl::StatusOr<at::Tensor>(const std::string& name)>;

// One of several micro-batches that go through a stage together.
struct MergedMicrobatch {
  int microbatch = 0;  // index in the step over all replicas: key of the dropout generator
  int64_t tokens = 0;  // whose rows follow those of the one before
};

// The inputs of one micro-batch, or of several that go through a stage together. All on the host; the stage moves what it needs.
struct MicrobatchInput {
  int64_t step = 0;    // key of the dropout generator
  int microbatch = 0;  // index in the step over all replicas: key of the dropout generator and of the stored activations
  // Several: dropout draws for each as if it were alone, so that merging them changes no mask. Empty: `microbatch` is all.
  std::vector<MergedMicrobatch> merged;
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

// Tensors that a stage holds between two steps.
struct HeldBytes {
  int64_t weights = 0;  // frozen, with the adapters' columns and the buffers that layers are gathered into
  int64_t masters = 0;  // and their compute copies outside of the weights
  int64_t gradients = 0;
  int64_t activations = 0;  // kept for backward, at their most so far, and one layer's where that is made again
  int64_t scratch = 0;      // buffers that all layers share
};

class StageModel {
 public:
  static absl::StatusOr<std::unique_ptr<StageModel>> Create(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source);
  virtual ~StageModel() = default;

  // hidden_in: [tokens, hidden] (undefined on the first stage). Returns hidden_out [tokens, hidden]; on the last stage an undefined tensor, and
  // the loss sum (fp64 sum of -log p over the targets, unscaled) is added to *loss_sum, or with loss_sum null to loss_total(), which waits for nothing; the
  // head's gradient is computed in the same pass.
  // Keeps what backward needs under `microbatch` if keep_for_backward.
  virtual absl::StatusOr<at::Tensor> Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep_for_backward, double* loss_sum) = 0;

  // grad_out: [tokens, hidden] (undefined on the last stage). Returns grad_in [tokens, hidden] (undefined on the first stage); adds the adapters' gradients.
  virtual absl::StatusOr<at::Tensor> Backward(const MicrobatchInput& input, const at::Tensor& grad_out) = 0;

  // Instead of both for a micro-batch without tokens: takes part in what the replicas do together.
  virtual absl::Status Idle(bool /*backward*/) { return absl::OkStatus(); }

  // [1] fp64 on the stage's device, the caller's to read and to zero; undefined without a head.
  virtual at::Tensor loss_total() { return at::Tensor(); }

  // Logits [rows.size(), vocab] fp32 on the host of the given rows; last stage, no gradient (verification, tests).
  virtual absl::StatusOr<at::Tensor> Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) = 0;

  // Fixed order: by layer, then q k v o gate up down, A before B. Masters may be written; AdapterChanged() then refreshes the compute copies.
  virtual std::vector<Parameter>& parameters() = 0;
  virtual void AdapterChanged() = 0;
  virtual void ZeroGradients() = 0;
  // Needed before the first pass with weights kSharded; outlives this object.
  virtual void Attach(ReplicaExchange* /*replicas*/) {}
  // ZeRO 2: from now on a layer's gradients are summed over the replicas as soon as backward has made them, and only this replica's part of the sum is kept:
  // elements [bounds[index], bounds[index + 1]) of the flat buffer. The parameters' own gradients become undefined. `replicas` outlives
  // this object.
  virtual absl::Status ShardGradients(ReplicaExchange* /*replicas*/, const std::vector<int64_t>& /*bounds*/) {
    return absl::UnimplementedError("this stage cannot share out its gradients");
  }
  virtual at::Tensor gradient_shard() { return at::Tensor(); }
  // The same parameters as flat buffers with their compute copies, for a DeviceOptimizer that updates all of them; spans in the order of parameters().
  virtual FlatParameters flat_parameters() { return {}; }

  // The base model's own tensors in HF names with the adapter merged in: W + scale * B A in fp32, then cast to `dtype`, on the host. One call per
  // tensor of this stage.
  virtual absl::Status ForEachMerged(at::ScalarType dtype, const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit) = 0;

  // Names and shapes of those calls, in their order.
  virtual std::vector<model::ExpectedTensor> merged_tensors() const = 0;

  virtual int64_t activation_bytes() const = 0;  // held now for backward
  // The last step is over: what only steps need is given back. Passes without a backward go on, with buffers of no more than they need.
  virtual void EndSteps() {}
  // Passes that were launched as captured, so far.
  virtual int64_t captured_launches() const { return 0; }
  virtual HeldBytes held_bytes() const { return {}; }
};

}  // namespace ppft::trainer
