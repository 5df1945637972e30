// What a stage of a rank holds in memory, part by part, as the trainer allocates it (worker/trainer/model: llama_stage, activations, decoder_layer,
// loss_head, sharded_weights; the adapter's state in worker/trainer/engine). tests/worker/trainer/model/stage_memory_test holds the two together.
// PURE; bounds of ModelConfig keep what a device can hold within int64, larger sums are exact enough in double.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "common/model/cost.h"

namespace ppft::model {

// What a forward pass keeps for its backward pass. The norms' and SwiGLU's outputs are always made again.
enum class ActivationCheckpointing {
  kNone,       // the layers' other intermediate values
  kSelective,  // those without the product of gate and up, the largest: backward makes it again
  kFull,       // the layers' inputs alone: backward goes forward through each layer again
};
absl::StatusOr<ActivationCheckpointing> ParseActivationCheckpointing(absl::string_view word);  // none | selective | full
absl::string_view WordOf(ActivationCheckpointing checkpointing);

struct StageShape {
  int64_t num_layers = 0;
  bool has_embedding = false;
  bool has_head = false;
};

struct StageMemoryOptions {
  bool cuda = false;
  int64_t compute_bytes = 4;     // of an element: fp32 4, bf16 and fp16 2
  int64_t tokens = 0;            // of the largest pass: of its micro-batches together
  int64_t targets = 0;           // of its tokens, those whose loss is taken, at most
  int64_t longest_document = 0;  // tokens
  int64_t documents = 1;         // of the largest pass, at most
  int64_t head_rows = 256;       // rows of logits at a time
  bool dropout = false;          // on the adapters' inputs
  bool evaluates = false;        // forward passes without a backward
  ActivationCheckpointing checkpointing = ActivationCheckpointing::kNone;
  bool flash = false;          // cuda: attention through flash where cuDNN's could serve, too
  bool deterministic = false;  // cuda
  int zero_stage = 0;          // 1: moments, 2: gradients too, 3: the layers' matrices too are shared out over the replicas
  int replicas = 1;
};

// Rows of logits at a time in the trainer: on a CPU they have to stay in cache, a GPU wants to be filled.
inline constexpr int64_t kCpuHeadRows = 256;
inline constexpr int64_t kCudaHeadRows = 2048;
inline constexpr int64_t kCudaSmallHeadRows = 1024;  // with full checkpointing: no more than SwiGLU's output takes
// A GPU's passes over up to so many tokens are captured, and what they allocate for a while comes from a pool of their own.
inline constexpr int64_t kMostCapturedTokens = 32768;

// Of the document that a verification sends through the model; a pass may be padded to twice as many.
inline constexpr int64_t kProbeTokens = 64;

// Whether a GPU's attention is plain products, document by document from the host: where neither cuDNN nor flash serves. Such passes are not captured, for a
// captured one keeps the documents that it was captured with.
inline constexpr bool AttentionIsPlainProducts(int64_t compute_bytes, int64_t head_dim) { return compute_bytes != 2 || head_dim % 8 != 0 || head_dim > 256; }

// Bytes. All but `kept` once per stage, whatever the number of passes.
struct StageMemory {
  int64_t weights = 0;    // frozen, with the adapters' columns ([W | sB]) and, shared out, the two buffers that layers are gathered into
  int64_t masters = 0;    // fp32, and the compute copies of A beside them
  int64_t gradients = 0;  // fp32; shared out: this replica's part and two layers' buffers
  int64_t moments = 0;    // fp32, two of AdamW
  int64_t kept = 0;       // for backward, of one pass of `tokens`
  int64_t transient = 0;  // one layer's activations: what backward makes again, or a pass without a backward
  int64_t scratch = 0;    // buffers that all layers share, the logits' among them
  int64_t temporary = 0;  // of the largest operation: copies, gradients and workspace of attention; on a CPU also of the products
};

StageMemory MemoryOfStage(const ModelConfig& config, const LoraShape& lora, const StageShape& stage, const StageMemoryOptions& options);

}  // namespace ppft::model
