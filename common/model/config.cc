#include "common/model/config.h"

#include <cmath>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/json.h"

namespace ppft::model {
namespace {

using nlohmann::json;

constexpr int64_t kMaxHidden = 1 << 16;
constexpr int64_t kMaxIntermediate = 1 << 18;
constexpr int64_t kMaxLayers = 1 << 10;
constexpr int64_t kMaxHeads = 1 << 10;
constexpr int64_t kMaxHeadDim = 1 << 10;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxPositions = 1 << 24;

// One JSON object with the names for errors.
class Fields {
 public:
  Fields(const json& object, std::string source, std::string prefix) : object_(object), source_(std::move(source)), prefix_(std::move(prefix)) {}

  // The value, or nullptr if it is absent or null.
  const json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  absl::Status Refuse(absl::string_view key, absl::string_view sentence) const {
    const auto it = object_.find(std::string(key));
    return absl::InvalidArgumentError(
        absl::StrCat(source_, ": ", prefix_, key, it == object_.end() ? "" : absl::StrCat(" = ", ShortJson(*it)), ": ", sentence));
  }
  absl::Status Integer(const char* key, int64_t min, int64_t max, std::optional<int64_t> fallback, int64_t* out) const {
    const json* value = Find(key);
    if (value == nullptr) {
      if (!fallback) return Refuse(key, "is missing: a LlamaForCausalLM needs it; take config.json from the model's publisher");
      *out = *fallback;
      return absl::OkStatus();
    }
    const bool fits = value->is_number_integer() && !(value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX));
    if (!fits || value->get<int64_t>() < min || value->get<int64_t>() > max) {
      return Refuse(key, absl::StrCat("must be an integer from ", min, " to ", max));
    }
    *out = value->get<int64_t>();
    return absl::OkStatus();
  }
  absl::Status Positive(const char* key, double max, std::optional<double> fallback, double* out) const {
    const json* value = Find(key);
    if (value == nullptr) {
      if (!fallback) return Refuse(key, "is missing");
      *out = *fallback;
      return absl::OkStatus();
    }
    const double number = value->is_number() ? value->get<double>() : 0.0;
    if (!std::isfinite(number) || number <= 0 || number > max) return Refuse(key, absl::StrCat("must be a number above 0 and at most ", max));
    *out = number;
    return absl::OkStatus();
  }
  absl::Status Bool(const char* key, bool fallback, bool* out) const {
    const json* value = Find(key);
    if (value != nullptr && !value->is_boolean()) return Refuse(key, "must be true or false");
    *out = value == nullptr ? fallback : value->get<bool>();
    return absl::OkStatus();
  }
  // The feature must be off.
  absl::Status MustBeFalse(const char* key, absl::string_view what) const {
    bool on = false;
    PPFT_RETURN_IF_ERROR(Bool(key, false, &on));
    if (on) return Refuse(key, absl::StrCat(what, " is not supported; use a Llama model without it"));
    return absl::OkStatus();
  }
  const std::string& source() const { return source_; }

 private:
  const json& object_;
  const std::string source_;
  const std::string prefix_;
};

absl::Status CheckKind(const Fields& f, ModelConfig* config) {
  const json* architectures = f.Find("architectures");
  if (architectures == nullptr) return f.Refuse("architectures", "is missing: expected [\"LlamaForCausalLM\"]");
  if (!architectures->is_array() || architectures->size() != 1 || !architectures->at(0).is_string() ||
      architectures->at(0).get<std::string>() != "LlamaForCausalLM") {
    return f.Refuse("architectures", "this architecture is not supported; use a model whose architectures is [\"LlamaForCausalLM\"]");
  }
  config->architecture = "LlamaForCausalLM";
  const json* type = f.Find("model_type");
  if (type != nullptr && *type != "llama") return f.Refuse("model_type", "this kind of model is not supported; expected \"llama\"");
  if (f.Find("auto_map") != nullptr)
    return f.Refuse("auto_map", "the model brings its own code, and code from model folders is never run; use a plain Llama model");
  if (f.Find("quantization_config") != nullptr || f.Find("compression_config") != nullptr) {
    return f.Refuse(f.Find("quantization_config") != nullptr ? "quantization_config" : "compression_config",
                    "quantized weights are not supported; use the original float32, bfloat16 or float16 checkpoint");
  }
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    if (f.Find(key) != nullptr) return f.Refuse(key, "mixtures of experts are not supported; use a dense Llama model");
  }
  return absl::OkStatus();
}

absl::Status CheckFeatures(const Fields& f) {
  PPFT_RETURN_IF_ERROR(f.MustBeFalse("attention_bias", "a bias in the attention projections"));
  PPFT_RETURN_IF_ERROR(f.MustBeFalse("mlp_bias", "a bias in the MLP"));
  const json* act = f.Find("hidden_act");
  if (act != nullptr && *act != "silu" && *act != "swish") return f.Refuse("hidden_act", "this activation is not supported; expected \"silu\"");
  const json* dropout = f.Find("attention_dropout");
  if (dropout != nullptr && (!dropout->is_number() || dropout->get<double>() != 0.0)) {
    return f.Refuse("attention_dropout", "dropout in the attention is not supported; set it to 0.0");
  }
  bool uses_window = true;  // a window without the switch counts
  PPFT_RETURN_IF_ERROR(f.Bool("use_sliding_window", true, &uses_window));
  if (f.Find("sliding_window") != nullptr && uses_window)
    return f.Refuse("sliding_window", "sliding-window attention is not supported; use a model with full attention");
  const json* layer_types = f.Find("layer_types");
  if (layer_types != nullptr) {
    if (!layer_types->is_array()) return f.Refuse("layer_types", "must be a list");
    for (const json& type : *layer_types) {
      if (type != "full_attention")
        return f.Refuse("layer_types", absl::StrCat("the layer type ", ShortJson(type), " is not supported; every layer must be \"full_attention\""));
    }
  }
  const json* rotary = f.Find("partial_rotary_factor");
  if (rotary != nullptr && (!rotary->is_number() || rotary->get<double>() != 1.0)) {
    return f.Refuse("partial_rotary_factor", "rotating a part of each head is not supported; expected 1.0");
  }
  return absl::OkStatus();
}

struct Rope {
  std::optional<double> theta;
  std::optional<RopeScaling> scaling;
};

// The object under rope_scaling (transformers 4) or rope_parameters (transformers 5).
absl::Status ParseRope(const Fields& parent, const char* key, int64_t max_positions, Rope* rope) {
  const json* value = parent.Find(key);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_object()) return parent.Refuse(key, "must be an object or null");
  const Fields f(*value, parent.source(), absl::StrCat(key, "."));
  if (f.Find("rope_theta") != nullptr) {
    double theta = 0;
    PPFT_RETURN_IF_ERROR(f.Positive("rope_theta", 1e12, std::nullopt, &theta));
    rope->theta = theta;
  }
  const json* partial = f.Find("partial_rotary_factor");
  if (partial != nullptr && (!partial->is_number() || partial->get<double>() != 1.0)) {
    return f.Refuse("partial_rotary_factor", "rotating a part of each head is not supported; expected 1.0");
  }
  const char* type_key = f.Find("rope_type") != nullptr ? "rope_type" : "type";
  const json* type = f.Find(type_key);
  if (type == nullptr || *type == "default") {
    if (type == nullptr && f.Find("factor") != nullptr) return f.Refuse("rope_type", "is missing: expected \"llama3\" or \"default\"");
    return absl::OkStatus();
  }
  if (*type != "llama3") return f.Refuse(type_key, "this scaling of RoPE is not supported; expected \"llama3\" or \"default\"");
  RopeScaling s;
  PPFT_RETURN_IF_ERROR(f.Positive("factor", 1e6, std::nullopt, &s.factor));
  PPFT_RETURN_IF_ERROR(f.Positive("low_freq_factor", 1e6, std::nullopt, &s.low_freq_factor));
  PPFT_RETURN_IF_ERROR(f.Positive("high_freq_factor", 1e6, std::nullopt, &s.high_freq_factor));
  PPFT_RETURN_IF_ERROR(f.Integer("original_max_position_embeddings", 1, kMaxPositions, std::nullopt, &s.original_max_position_embeddings));
  if (s.factor < 1) return f.Refuse("factor", "must be at least 1");
  if (s.low_freq_factor >= s.high_freq_factor) {
    return f.Refuse("low_freq_factor", absl::StrCat("must be less than high_freq_factor (", s.high_freq_factor, ")"));
  }
  if (s.original_max_position_embeddings > max_positions) {
    return f.Refuse("original_max_position_embeddings", absl::StrCat("must be at most max_position_embeddings (", max_positions, ")"));
  }
  rope->scaling = s;
  return absl::OkStatus();
}

absl::Status ParseRopes(const Fields& f, ModelConfig* config) {
  Rope old_keys, new_keys;
  PPFT_RETURN_IF_ERROR(ParseRope(f, "rope_scaling", config->max_position_embeddings, &old_keys));
  PPFT_RETURN_IF_ERROR(ParseRope(f, "rope_parameters", config->max_position_embeddings, &new_keys));
  if (f.Find("rope_scaling") != nullptr && f.Find("rope_parameters") != nullptr && !(old_keys.scaling == new_keys.scaling)) {
    return f.Refuse("rope_parameters", "contradicts rope_scaling; keep one of them");
  }
  config->rope_scaling = f.Find("rope_parameters") != nullptr ? new_keys.scaling : old_keys.scaling;
  double theta = 10000.0;
  PPFT_RETURN_IF_ERROR(f.Positive("rope_theta", 1e12, 10000.0, &theta));
  const std::optional<double> nested = new_keys.theta ? new_keys.theta : old_keys.theta;
  if (nested && f.Find("rope_theta") != nullptr && *nested != theta)
    return f.Refuse("rope_theta", absl::StrCat("contradicts the nested rope_theta (", *nested, "); keep one of them"));
  config->rope_theta = nested.value_or(theta);
  return absl::OkStatus();
}

absl::Status ParseSizes(const Fields& f, ModelConfig* c) {
  PPFT_RETURN_IF_ERROR(f.Integer("hidden_size", 1, kMaxHidden, std::nullopt, &c->hidden_size));
  PPFT_RETURN_IF_ERROR(f.Integer("intermediate_size", 1, kMaxIntermediate, std::nullopt, &c->intermediate_size));
  PPFT_RETURN_IF_ERROR(f.Integer("num_hidden_layers", 1, kMaxLayers, std::nullopt, &c->num_layers));
  PPFT_RETURN_IF_ERROR(f.Integer("num_attention_heads", 1, kMaxHeads, std::nullopt, &c->num_attention_heads));
  PPFT_RETURN_IF_ERROR(f.Integer("num_key_value_heads", 1, kMaxHeads, c->num_attention_heads, &c->num_key_value_heads));
  if (c->num_attention_heads % c->num_key_value_heads != 0) {
    return f.Refuse("num_key_value_heads", absl::StrCat("must divide num_attention_heads (", c->num_attention_heads, ")"));
  }
  if (f.Find("head_dim") == nullptr && c->hidden_size % c->num_attention_heads != 0) {
    return f.Refuse("num_attention_heads", absl::StrCat("must divide hidden_size (", c->hidden_size, ") when head_dim is not given"));
  }
  PPFT_RETURN_IF_ERROR(f.Integer("head_dim", 2, kMaxHeadDim, c->hidden_size / c->num_attention_heads, &c->head_dim));
  if (c->head_dim < 2 || c->head_dim > kMaxHeadDim || c->head_dim % 2 != 0) {
    return f.Refuse("head_dim", absl::StrCat("the size of a head (", c->head_dim, ") must be even and from 2 to ", kMaxHeadDim, ": RoPE rotates pairs"));
  }
  PPFT_RETURN_IF_ERROR(f.Integer("vocab_size", 2, kMaxVocab, std::nullopt, &c->vocab_size));
  return f.Integer("max_position_embeddings", 1, kMaxPositions, 2048, &c->max_position_embeddings);
}

absl::Status ParseDtype(const Fields& f, ModelConfig* c) {
  const char* key = f.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  const json* value = f.Find(key);
  if (value == nullptr || *value == "auto") return absl::OkStatus();
  for (const char* known : {"float32", "bfloat16", "float16"}) {
    if (*value == known) c->dtype = known;
  }
  if (c->dtype.empty()) return f.Refuse(key, "this type is not supported; expected float32, bfloat16 or float16");
  return absl::OkStatus();
}

absl::Status ParseTokenIds(const Fields& f, ModelConfig* c) {
  if (f.Find("bos_token_id") != nullptr) {
    int64_t bos = 0;
    PPFT_RETURN_IF_ERROR(f.Integer("bos_token_id", -1, c->vocab_size - 1, std::nullopt, &bos));
    if (bos >= 0) c->bos_token_id = bos;
  }
  const json* eos = f.Find("eos_token_id");
  if (eos == nullptr) return absl::OkStatus();
  if (!eos->is_array()) {
    int64_t id = 0;
    PPFT_RETURN_IF_ERROR(f.Integer("eos_token_id", -1, c->vocab_size - 1, std::nullopt, &id));
    if (id >= 0) c->eos_token_ids.push_back(id);
    return absl::OkStatus();
  }
  for (const json& id : *eos) {
    if (!id.is_number_integer() || id < 0 || id >= c->vocab_size)
      return f.Refuse("eos_token_id", absl::StrCat("must hold token ids from 0 to ", c->vocab_size - 1));
    c->eos_token_ids.push_back(id.get<int64_t>());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, absl::string_view source) {
  PPFT_ASSIGN_OR_RETURN(const json object, ParseStrictObject(text, source));
  const Fields f(object, std::string(source), "");
  ModelConfig config;
  PPFT_RETURN_IF_ERROR(CheckKind(f, &config));
  PPFT_RETURN_IF_ERROR(CheckFeatures(f));
  PPFT_RETURN_IF_ERROR(ParseSizes(f, &config));
  PPFT_RETURN_IF_ERROR(f.Positive("rms_norm_eps", 1.0, 1e-6, &config.rms_norm_eps));
  PPFT_RETURN_IF_ERROR(ParseRopes(f, &config));
  PPFT_RETURN_IF_ERROR(f.Bool("tie_word_embeddings", false, &config.tie_word_embeddings));
  PPFT_RETURN_IF_ERROR(ParseDtype(f, &config));
  PPFT_RETURN_IF_ERROR(ParseTokenIds(f, &config));
  return config;
}

}  // namespace ppft::model
