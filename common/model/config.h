// config.json of a Hugging Face model folder -> ModelConfig. Llama-family decoder models alone; what would change the computation and is not
// supported is refused by name, never ignored. PURE.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft::model {

// rope_type "llama3": frequencies are divided by `factor` below low_freq, kept above high_freq and blended in between.
struct RopeScaling {
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 8192;

  bool operator==(const RopeScaling&) const = default;
};

// Every size is at least 1 and bounded (config.cc), so that products of a whole model fit in int64.
struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;  // divides num_attention_heads
  int64_t head_dim = 0;             // even; num_attention_heads * head_dim may differ from hidden_size
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 0;
  double rope_theta = 0;
  std::optional<RopeScaling> rope_scaling;  // unset: rope_type "default"
  bool tie_word_embeddings = false;
  std::string dtype;  // float32 | bfloat16 | float16 as config.json says; "" if it does not say
  std::optional<int64_t> bos_token_id;
  std::vector<int64_t> eos_token_ids;

  int64_t query_size() const { return num_attention_heads * head_dim; }
  int64_t key_value_size() const { return num_key_value_heads * head_dim; }
};

// `source` names the file in errors ("models/x/config.json"). INVALID_ARGUMENT names file, field, value and remedy.
// Reads both the keys of transformers 4 (rope_theta, rope_scaling, torch_dtype) and those of transformers 5 (rope_parameters, dtype).
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view json, absl::string_view source);

}  // namespace ppft::model
