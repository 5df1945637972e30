// PEFT's LoRA files: adapter_config.json and the key names of adapter_model.safetensors. PURE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "common/model/inventory.h"
#include "common/model/safetensors.h"

namespace ppft::model {

struct AdapterConfig {
  int64_t r = 0;
  double lora_alpha = 0;
  double lora_dropout = 0;
  std::vector<std::string> target_modules;  // of TargetModules(), in that order
  bool use_rslora = false;
  std::string base_model;  // base_model_name_or_path; "" if it does not say

  double scale() const;
};

// What PEFT's loader would do differently from us is refused with a sentence: another peft_type, bias, DoRA, patterns, modules_to_save, unknown
// features that are switched on. target_modules may be "all-linear", names, or full module paths that cover every layer alike.
absl::StatusOr<AdapterConfig> ParseAdapterConfig(absl::string_view json, absl::string_view source);
// The stable keys only, sorted; lora_alpha is an integer when it is one.
std::string AdapterConfigText(const AdapterConfig& config);

// What B A x is multiplied with: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
double LoraScale(int64_t r, double lora_alpha, bool use_rslora);

// "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"; matrix is "lora_A" (r x in) or "lora_B" (out x r).
std::string PeftKey(int64_t layer, absl::string_view module, absl::string_view matrix);
// All keys and shapes of an adapter on this model, sorted by key.
std::vector<ExpectedTensor> AdapterTensors(const ModelConfig& model, int64_t r, const std::vector<std::string>& target_modules);

// An adapter's file against a model: every tensor there with its shape and a floating type, nothing else. INVALID_ARGUMENT says which tensor
// differs: the adapter belongs to another model.
absl::Status CheckAdapterFits(const AdapterConfig& adapter, const SafetensorsHeader& file, const ModelConfig& model, absl::string_view source);

}  // namespace ppft::model
