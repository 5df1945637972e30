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

}  // namespace

Flops LayerFlops(const ModelConfig& config, const LoraShape& lora, int64_t tokens, int64_t document_tokens) {
  const double linear = 2.0 * static_cast<double>(LinearParameters(config));
  const double adapter = 2.0 * static_cast<double>(AdapterParametersOfLayer(config, lora));
  // Scores and values: 2 products of 2 x query_size per pair; a token sees half of its document on average.
  const double attention = 2.0 * static_cast<double>(config.query_size()) * static_cast<double>(document_tokens);
  const double count = static_cast<double>(tokens);
  return {count * (linear + attention + adapter), count * (linear + 2 * attention + 2 * adapter)};
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

int64_t ActivationBytesOfLayer(const ModelConfig& config, const LoraShape& lora, int64_t tokens, int64_t compute_bytes) {
  const int64_t elements = 2 * config.hidden_size + (config.query_size() + 2 * config.key_value_size()) + config.query_size() + 2 * config.intermediate_size +
                           lora.r * static_cast<int64_t>(lora.target_modules.size());
  const int64_t statistics = 4 * (2 + config.num_attention_heads);  // fp32: 1/rms twice, log-sum-exp per head
  return tokens * (elements * compute_bytes + statistics);
}

int64_t HiddenBytes(const ModelConfig& config, int64_t tokens, int64_t compute_bytes) { return tokens * config.hidden_size * compute_bytes; }

}  // namespace ppft::model
