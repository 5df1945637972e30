// Models of random weights for the GPU tests and benches: made on the device, never on disk.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/model/config.h"
#include "common/model/inventory.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

inline model::ModelConfig ConfigOf(int64_t hidden, int64_t intermediate, int64_t layers, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t vocab,
                                   bool tied) {
  model::ModelConfig config;
  config.hidden_size = hidden;
  config.intermediate_size = intermediate;
  config.num_layers = layers;
  config.num_attention_heads = heads;
  config.num_key_value_heads = kv_heads;
  config.head_dim = head_dim;
  config.vocab_size = vocab;
  config.max_position_embeddings = 8192;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 500000;
  config.tie_word_embeddings = tied;
  return config;
}

// The same tensor for a name each time: norms of ones, all else normal with deviation 0.02.
inline TensorSource RandomSource(const model::ModelConfig& config, const at::TensorOptions& options) {
  auto shapes = std::make_shared<std::map<std::string, std::vector<int64_t>>>();
  for (const model::ExpectedTensor& t : model::ExpectedTensors(config)) (*shapes)[t.name] = t.shape;
  return [shapes, options](const std::string& name) -> absl::StatusOr<at::Tensor> {
    const auto it = shapes->find(name);
    if (it == shapes->end()) return absl::NotFoundError(name);
    if (it->second.size() == 1) return at::ones(it->second, options);
    at::manual_seed(std::hash<std::string>()(name));
    return at::randn(it->second, options).mul_(0.02);
  };
}

inline std::vector<std::string> AllTargets() { return model::TargetModules(); }

}  // namespace ppft::trainer
