#include "common/model/cost.h"

#include "common/model/inventory.h"

namespace ppft::model {
namespace {

int64_t LinearParameters(const ModelConfig& config) {
  int64_t sum = 0;
  for (const std::string& module : TargetModules()) {
    const LinearShape shape = ShapeOfModule(config, module);
    sum += shape.out * shape.in;
  }
  return sum;
}

// Of a token, forward; the adapters' and attention's backward is twice that.
struct TokenFlops {
  double linear = 0;
  double adapter = 0;
  double attention = 0;
};

TokenFlops TokenFlopsOf(const ModelConfig& config, const LoraShape& lora, int64_t document_tokens) {
  TokenFlops flops;
  flops.linear = 2.0 * static_cast<double>(LinearParameters(config));
  flops.adapter = 2.0 * static_cast<double>(AdapterParametersOfLayer(config, lora));
  // Scores and values: 2 products of 2 x query_size per pair; a token sees half of its document on average.
  flops.attention = 2.0 * static_cast<double>(config.query_size()) * static_cast<double>(document_tokens);
  return flops;
}

// Time on a GPU, against that of a FLOP of the head's products.
constexpr double kLinearFlop = 750.0 / 650.0;
constexpr double kAttentionFlop = 750.0 / 230.0;
constexpr double kMovedElement = 2 * 750.0 / 3.5;

}  // namespace

Flops LayerFlops(const ModelConfig& config, const LoraShape& lora, int64_t tokens, int64_t document_tokens) {
  const TokenFlops of = TokenFlopsOf(config, lora, document_tokens);
  const double count = static_cast<double>(tokens);
  return {count * (of.linear + of.attention + of.adapter), count * (of.linear + 2 * of.attention + 2 * of.adapter)};
}

Flops LayerTimeOnGpu(const ModelConfig& config, const LoraShape& lora, int64_t tokens, int64_t document_tokens) {
  const TokenFlops of = TokenFlopsOf(config, lora, document_tokens);
  const auto hidden = static_cast<double>(config.hidden_size), ffn = static_cast<double>(config.intermediate_size);
  const auto query = static_cast<double>(config.query_size()), row = query + 2 * static_cast<double>(config.key_value_size());
  // Elements read and written: two norms (4 and 5 rows each), RoPE (2), SwiGLU (3 and 5), and what the adapters' products read again.
  const double forward = 8 * hidden + 2 * row + 3 * ffn + (2 * hidden + query + ffn);
  const double backward = 10 * hidden + 2 * row + 5 * ffn + (3 * hidden + row + 2 * ffn);
  const double count = static_cast<double>(tokens), products = kLinearFlop * of.linear;
  return {count * (products + kLinearFlop * of.adapter + kAttentionFlop * of.attention + kMovedElement * forward),
          count * (products + 2 * kLinearFlop * of.adapter + 2 * kAttentionFlop * of.attention + kMovedElement * backward)};
}

Flops HeadTimeOnGpu(const ModelConfig& config, int64_t targets) {
  // The loss reads a row of logits, most of it twice, and writes its gradient.
  Flops time = HeadFlops(config, targets);
  time.forward += kMovedElement * 3 * static_cast<double>(config.vocab_size) * static_cast<double>(targets);
  return time;
}

Flops HeadFlops(const ModelConfig& config, int64_t targets) {
  return {4.0 * static_cast<double>(EmbeddingParameters(config)) * static_cast<double>(targets), 0.0};
}

int64_t LayerParameters(const ModelConfig& config) { return LinearParameters(config) + 2 * config.hidden_size; }

int64_t EmbeddingParameters(const ModelConfig& config) { return config.vocab_size * config.hidden_size; }

int64_t HeadParameters(const ModelConfig& config) { return EmbeddingParameters(config) + config.hidden_size; }

int64_t TotalParameters(const ModelConfig& config) {
  return config.num_layers * LayerParameters(config) + HeadParameters(config) + (config.tie_word_embeddings ? 0 : EmbeddingParameters(config));
}

int64_t AdapterParametersOfLayer(const ModelConfig& config, const LoraShape& lora) {
  int64_t sum = 0;
  for (const std::string& module : lora.target_modules) {
    const LinearShape shape = ShapeOfModule(config, module);
    sum += lora.r * (shape.in + shape.out);
  }
  return sum;
}

int64_t HiddenBytes(const ModelConfig& config, int64_t tokens, int64_t compute_bytes) { return tokens * config.hidden_size * compute_bytes; }

}  // namespace ppft::model
