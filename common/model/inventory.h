// Which tensors a Llama model has: names and shapes by config, as a whole and for one stage. PURE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "common/model/safetensors.h"

namespace ppft::model {

struct ExpectedTensor {
  std::string name;            // "model.layers.0.self_attn.q_proj.weight"
  std::vector<int64_t> shape;  // [out, in]

  bool operator==(const ExpectedTensor&) const = default;
};

// The seven linear layers of a decoder layer in the order that is used everywhere: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj.
const std::vector<std::string>& TargetModules();
// "self_attn.q_proj", "mlp.up_proj"; the module must be one of TargetModules.
std::string ModulePath(absl::string_view module);
struct LinearShape {
  int64_t out = 0;
  int64_t in = 0;
};
LinearShape ShapeOfModule(const ModelConfig& config, absl::string_view module);

inline constexpr char kEmbeddingName[] = "model.embed_tokens.weight";  // [vocab, hidden]
inline constexpr char kFinalNormName[] = "model.norm.weight";          // [hidden]
inline constexpr char kHeadName[] = "lm_head.weight";                  // [vocab, hidden]; absent with tied embeddings

// The nine tensors of one layer: the seven linears, input_layernorm, post_attention_layernorm.
std::vector<ExpectedTensor> TensorsOfLayer(const ModelConfig& config, int64_t layer);
// All, in model order.
std::vector<ExpectedTensor> ExpectedTensors(const ModelConfig& config);
// Of one stage. With tied embeddings the head is the embedding's tensor; a stage with both has it once.
std::vector<ExpectedTensor> TensorsOfStage(const ModelConfig& config, int64_t first_layer, int64_t num_layers, bool has_embedding, bool has_head);

// Tensors that old checkpoints carry and no Llama model reads: rotary_emb.inv_freq of each layer, and lm_head.weight when the embeddings are tied.
bool IsIgnoredTensor(const ModelConfig& config, absl::string_view name);

// `present` (of all files together, names unique) against the config: a missing tensor, another shape, another dtype than F32, BF16 or F16, or an
// unknown tensor is INVALID_ARGUMENT "source: …". Ignored tensors may be there.
absl::Status CheckInventory(const ModelConfig& config, const std::vector<TensorInfo>& present, absl::string_view source);

}  // namespace ppft::model
