#include "common/model/peft.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"
#include "common/model/json.h"

namespace ppft::model {
namespace {

using nlohmann::json;

constexpr int64_t kMaxRank = 1024;

absl::Status Refuse(absl::string_view source, absl::string_view key, const json& value, absl::string_view sentence) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", key, " = ", ShortJson(value), ": ", sentence));
}

bool IsOff(const json& value) { return value.is_null() || value == false || ((value.is_object() || value.is_array() || value.is_string()) && value.empty()); }

// Keys that say nothing about the computation, or that are read by name below.
bool IsNeutral(const std::string& key) {
  static const std::set<std::string>& keys = *new std::set<std::string>{"auto_mapping",   "base_model_name_or_path",
                                                                        "inference_mode", "peft_version",
                                                                        "revision",       "task_type",
                                                                        "megatron_core",  "qalora_group_size",
                                                                        "peft_type",      "r",
                                                                        "lora_alpha",     "lora_dropout",
                                                                        "use_rslora",     "target_modules",
                                                                        "bias",           "init_lora_weights",
                                                                        "layers_pattern", "loftq_config",
                                                                        "corda_config",   "eva_config",
                                                                        "lora_ga_config", "runtime_config"};
  return keys.count(key) != 0;
}

absl::Status CheckFeatures(const json& object, absl::string_view source) {
  const json type = object.value("peft_type", json());
  if (type != "LORA") return Refuse(source, "peft_type", type, "only LoRA adapters are supported (\"LORA\")");
  const json task = object.value("task_type", json());
  if (!task.is_null() && task != "CAUSAL_LM") return Refuse(source, "task_type", task, "expected \"CAUSAL_LM\"");
  const json bias = object.value("bias", json("none"));
  if (bias != "none") return Refuse(source, "bias", bias, "trained biases are not supported; expected \"none\"");
  // These initialisations change the base model's weights, so the adapter alone does not say what to add.
  const json init = object.value("init_lora_weights", json(true));
  if (init.is_string() && init != "gaussian" && init != "eva" && init != "orthogonal") {
    return Refuse(source, "init_lora_weights", init,
                  "this initialisation changes the base model; convert the adapter to plain LoRA with PEFT's path_initial_model_for_weight_conversion");
  }
  for (const auto& [key, value] : object.items()) {
    if (!IsNeutral(key) && !IsOff(value)) return Refuse(source, key, value, "this feature of PEFT is not supported; train the adapter without it");
  }
  return absl::OkStatus();
}

// One entry of the list: "q_proj", "self_attn.q_proj" or "model.layers.3.self_attn.q_proj". layer is -1 for all.
absl::Status ParseTarget(const std::string& text, absl::string_view source, std::string* module, int64_t* layer) {
  const std::vector<std::string> parts = absl::StrSplit(text, '.');
  *module = parts.back();
  *layer = -1;
  const auto& known = TargetModules();
  bool good = std::find(known.begin(), known.end(), *module) != known.end();
  if (good && parts.size() > 1) good = absl::StrCat(parts[parts.size() - 2], ".", *module) == ModulePath(*module);
  if (good && parts.size() > 2) {
    good = parts.size() >= 4 && parts[parts.size() - 4] == "layers" && absl::SimpleAtoi(parts[parts.size() - 3], layer) && *layer >= 0 &&
           (parts.size() == 4 || (parts.size() == 5 && parts[0] == "model"));
  }
  if (good) return absl::OkStatus();
  return Refuse(source, "target_modules", text,
                absl::StrCat("not a linear layer of a Llama model; expected \"all-linear\" or some of ", absl::StrJoin(known, ", ")));
}

absl::Status ParseTargets(const json& value, absl::string_view source, AdapterConfig* config) {
  if (value == "all-linear") {
    config->target_modules = TargetModules();
    return absl::OkStatus();
  }
  if (value.is_string()) return Refuse(source, "target_modules", value, "patterns are not supported; write a list of names");
  if (!value.is_array() || value.empty()) return Refuse(source, "target_modules", value, "must be \"all-linear\" or a list of names");
  std::map<std::string, std::set<int64_t>> layers;  // by module; {-1} = all
  for (const json& item : value) {
    if (!item.is_string()) return Refuse(source, "target_modules", item, "must be a name");
    std::string module;
    int64_t layer = -1;
    PPFT_RETURN_IF_ERROR(ParseTarget(item.get<std::string>(), source, &module, &layer));
    layers[module].insert(layer);
  }
  const std::set<int64_t>& first = layers.begin()->second;
  for (const auto& [module, set] : layers) {
    const bool contiguous = *set.rbegin() - *set.begin() + 1 == static_cast<int64_t>(set.size()) && *set.begin() <= 0;
    if (set != first || !contiguous || (set.size() > 1 && *set.begin() < 0)) {
      return absl::InvalidArgumentError(absl::StrCat(source, ": target_modules adapts ", module, " in only some layers; every layer must be adapted alike"));
    }
  }
  for (const std::string& module : TargetModules()) {
    if (layers.count(module) != 0) config->target_modules.push_back(module);
  }
  return absl::OkStatus();
}

}  // namespace

double AdapterConfig::scale() const { return LoraScale(r, lora_alpha, use_rslora); }

double LoraScale(int64_t r, double lora_alpha, bool use_rslora) {
  return lora_alpha / (use_rslora ? std::sqrt(static_cast<double>(r)) : static_cast<double>(r));
}

absl::StatusOr<AdapterConfig> ParseAdapterConfig(absl::string_view text, absl::string_view source) {
  PPFT_ASSIGN_OR_RETURN(const json object, ParseStrictObject(text, source));
  PPFT_RETURN_IF_ERROR(CheckFeatures(object, source));
  AdapterConfig config;
  const json r = object.value("r", json());
  if (!r.is_number_integer() || r < 1 || r > kMaxRank) return Refuse(source, "r", r, absl::StrCat("must be an integer from 1 to ", kMaxRank));
  config.r = r.get<int64_t>();
  const json alpha = object.value("lora_alpha", json());
  if (!alpha.is_number() || !std::isfinite(alpha.get<double>()) || alpha.get<double>() <= 0)
    return Refuse(source, "lora_alpha", alpha, "must be a number above 0");
  config.lora_alpha = alpha.get<double>();
  const json dropout = object.value("lora_dropout", json(0.0));
  if (!dropout.is_number() || !(dropout.get<double>() >= 0 && dropout.get<double>() < 1))
    return Refuse(source, "lora_dropout", dropout, "must be a number from 0 to below 1");
  config.lora_dropout = dropout.get<double>();
  const json rslora = object.value("use_rslora", json(false));
  if (!rslora.is_boolean()) return Refuse(source, "use_rslora", rslora, "must be true or false");
  config.use_rslora = rslora.get<bool>();
  const json base = object.value("base_model_name_or_path", json());
  if (base.is_string()) config.base_model = base.get<std::string>();
  PPFT_RETURN_IF_ERROR(ParseTargets(object.value("target_modules", json()), source, &config));
  return config;
}

std::string AdapterConfigText(const AdapterConfig& config) {
  json object = {{"alpha_pattern", json::object()},
                 {"auto_mapping", nullptr},
                 {"base_model_name_or_path", config.base_model},
                 {"bias", "none"},
                 {"fan_in_fan_out", false},
                 {"inference_mode", true},
                 {"init_lora_weights", true},
                 {"layers_pattern", nullptr},
                 {"layers_to_transform", nullptr},
                 {"lora_dropout", config.lora_dropout},
                 {"modules_to_save", nullptr},
                 {"peft_type", "LORA"},
                 {"r", config.r},
                 {"rank_pattern", json::object()},
                 {"revision", nullptr},
                 {"target_modules", config.target_modules},
                 {"task_type", "CAUSAL_LM"},
                 {"use_dora", false},
                 {"use_rslora", config.use_rslora}};
  const bool integral = config.lora_alpha == std::floor(config.lora_alpha) && config.lora_alpha < 1e15;
  object["lora_alpha"] = integral ? json(static_cast<int64_t>(config.lora_alpha)) : json(config.lora_alpha);
  return object.dump(2) + "\n";
}

std::string PeftKey(int64_t layer, absl::string_view module, absl::string_view matrix) {
  return absl::StrCat("base_model.model.model.layers.", layer, ".", ModulePath(module), ".", matrix, ".weight");
}

std::vector<ExpectedTensor> AdapterTensors(const ModelConfig& model, int64_t r, const std::vector<std::string>& target_modules) {
  std::vector<ExpectedTensor> out;
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    for (const std::string& module : target_modules) {
      const LinearShape shape = ShapeOfModule(model, module);
      out.push_back({PeftKey(layer, module, "lora_A"), {r, shape.in}});
      out.push_back({PeftKey(layer, module, "lora_B"), {shape.out, r}});
    }
  }
  std::sort(out.begin(), out.end(), [](const ExpectedTensor& a, const ExpectedTensor& b) { return a.name < b.name; });
  return out;
}

absl::Status CheckAdapterFits(const AdapterConfig& adapter, const SafetensorsHeader& file, const ModelConfig& model, absl::string_view source) {
  std::map<absl::string_view, const TensorInfo*> present;
  for (const TensorInfo& tensor : file.tensors) present[tensor.name] = &tensor;
  for (const ExpectedTensor& want : AdapterTensors(model, adapter.r, adapter.target_modules)) {
    const auto have = present.find(want.name);
    if (have == present.end()) {
      return absl::InvalidArgumentError(absl::StrCat(source, ": the tensor ", want.name, " is missing: the adapter belongs to another model or is incomplete"));
    }
    if (have->second->shape != want.shape) {
      return absl::InvalidArgumentError(absl::StrCat(source, ": ", want.name, " has the shape ", ShapeText(have->second->shape),
                                                     ", but this model and rank need ", ShapeText(want.shape), ": the adapter belongs to another model"));
    }
    const std::string& dtype = have->second->dtype;
    if (dtype != "F32" && dtype != "BF16" && dtype != "F16") {
      return absl::InvalidArgumentError(absl::StrCat(source, ": ", want.name, " has the dtype ", dtype, "; F32, BF16 and F16 are supported"));
    }
    present.erase(have);
  }
  if (!present.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": the tensor ", present.begin()->first, " does not belong to a LoRA of these target_modules on this model"));
  }
  return absl::OkStatus();
}

}  // namespace ppft::model
