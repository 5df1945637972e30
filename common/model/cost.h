// What a model costs: FLOPs and bytes per layer, embedding and head. The accounting behind the planner and mfu: per token and layer
// forward 2 N + A + 2 P, backward 2 N + 2 A + 4 P (the base is frozen: no weight gradients), where N = parameters of the linears, P = parameters
// of their adapters and A = attention over the document's past; the head costs 4 h V per target row, its gradient included (it is made in the
// same pass). PURE; bounds of ModelConfig keep every product within int64 or exact enough in double.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/model/config.h"

namespace ppft::model {

struct LoraShape {
  int64_t r = 16;
  std::vector<std::string> target_modules;  // names of TargetModules()
};

struct Flops {
  double forward = 0;
  double backward = 0;
};

// One decoder layer over `tokens` tokens in documents of `document_tokens` tokens (causal attention).
Flops LayerFlops(const ModelConfig& config, const LoraShape& lora, int64_t tokens, int64_t document_tokens);
// Final norm, head, loss and the gradient of hidden over `targets` rows: all of it in forward.
Flops HeadFlops(const ModelConfig& config, int64_t targets);

// The same as the time that a GPU takes, in FLOPs of the head's products: the linears' products are narrower, attention is slower, and norms, SwiGLU, RoPE,
// adapters and the loss move rows through memory. Of one layer's share against the head's, which is what a cut needs; the factors are those of an H200
// (750 TFLOP/s for the head, 650 and 230 for linears and attention, 3.5 TB/s), for 2-byte activations.
Flops LayerTimeOnGpu(const ModelConfig& config, const LoraShape& lora, int64_t tokens, int64_t document_tokens);
Flops HeadTimeOnGpu(const ModelConfig& config, int64_t targets);

int64_t LayerParameters(const ModelConfig& config);      // linears and norms of one layer
int64_t EmbeddingParameters(const ModelConfig& config);  // vocab x hidden
int64_t HeadParameters(const ModelConfig& config);       // vocab x hidden + the final norm, tied or not: a stage with the head holds it
int64_t TotalParameters(const ModelConfig& config);      // a tied embedding once
int64_t AdapterParametersOfLayer(const ModelConfig& config, const LoraShape& lora);
// One hidden state [tokens, hidden] between stages.
int64_t HiddenBytes(const ModelConfig& config, int64_t tokens, int64_t compute_bytes);

}  // namespace ppft::model
