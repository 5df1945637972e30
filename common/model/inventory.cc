#include "common/model/inventory.h"

#include <algorithm>
#include <cstdlib>
#include <unordered_map>
#include <unordered_set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::model {
namespace {

std::string LayerPrefix(int64_t layer) { return absl::StrCat("model.layers.", layer, "."); }

absl::Status CheckTensor(const ExpectedTensor& want, const TensorInfo& have, absl::string_view source) {
  if (have.shape != want.shape) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": ", want.name, " has the shape ", ShapeText(have.shape), ", but config.json asks for ",
                                                   ShapeText(want.shape), ": config.json and weights belong to different models"));
  }
  if (have.dtype != "F32" && have.dtype != "BF16" && have.dtype != "F16") {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": ", want.name, " has the dtype ", have.dtype, "; F32, BF16 and F16 are supported: convert the model"));
  }
  return absl::OkStatus();
}

}  // namespace

const std::vector<std::string>& TargetModules() {
  static const std::vector<std::string>& modules = *new std::vector<std::string>{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
  return modules;
}

std::string ModulePath(absl::string_view module) {
  const bool attention = module == "q_proj" || module == "k_proj" || module == "v_proj" || module == "o_proj";
  return absl::StrCat(attention ? "self_attn." : "mlp.", module);
}

LinearShape ShapeOfModule(const ModelConfig& c, absl::string_view module) {
  if (module == "q_proj") return {c.query_size(), c.hidden_size};
  if (module == "k_proj" || module == "v_proj") return {c.key_value_size(), c.hidden_size};
  if (module == "o_proj") return {c.hidden_size, c.query_size()};
  if (module == "gate_proj" || module == "up_proj") return {c.intermediate_size, c.hidden_size};
  if (module == "down_proj") return {c.hidden_size, c.intermediate_size};
  std::abort();  // only the names of TargetModules may be asked for
}

std::vector<ExpectedTensor> TensorsOfLayer(const ModelConfig& config, int64_t layer) {
  std::vector<ExpectedTensor> out;
  for (const std::string& module : TargetModules()) {
    const LinearShape shape = ShapeOfModule(config, module);
    out.push_back({absl::StrCat(LayerPrefix(layer), ModulePath(module), ".weight"), {shape.out, shape.in}});
  }
  for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
    out.push_back({absl::StrCat(LayerPrefix(layer), norm, ".weight"), {config.hidden_size}});
  }
  return out;
}

std::vector<ExpectedTensor> ExpectedTensors(const ModelConfig& config) { return TensorsOfStage(config, 0, config.num_layers, true, true); }

std::vector<ExpectedTensor> TensorsOfStage(const ModelConfig& config, int64_t first_layer, int64_t num_layers, bool has_embedding, bool has_head) {
  const std::vector<int64_t> vocab_shape = {config.vocab_size, config.hidden_size};
  std::vector<ExpectedTensor> out;
  if (has_embedding) out.push_back({kEmbeddingName, vocab_shape});
  for (int64_t layer = first_layer; layer < first_layer + num_layers; ++layer) {
    for (ExpectedTensor& tensor : TensorsOfLayer(config, layer)) out.push_back(std::move(tensor));
  }
  if (!has_head) return out;
  out.push_back({kFinalNormName, {config.hidden_size}});
  if (!config.tie_word_embeddings) {
    out.push_back({kHeadName, vocab_shape});
  } else if (!has_embedding) {
    out.push_back({kEmbeddingName, vocab_shape});
  }
  return out;
}

bool IsIgnoredTensor(const ModelConfig& config, absl::string_view name) {
  if (config.tie_word_embeddings && name == kHeadName) return true;
  return absl::EndsWith(name, "rotary_emb.inv_freq");
}

absl::Status CheckInventory(const ModelConfig& config, const std::vector<TensorInfo>& present, absl::string_view source) {
  std::unordered_map<std::string, const TensorInfo*> by_name;
  for (const TensorInfo& tensor : present) by_name[tensor.name] = &tensor;
  std::unordered_set<std::string> expected;
  std::vector<std::string> missing;
  for (const ExpectedTensor& want : ExpectedTensors(config)) {
    expected.insert(want.name);
    const auto have = by_name.find(want.name);
    if (have == by_name.end()) {
      missing.push_back(want.name);
      continue;
    }
    PPFT_RETURN_IF_ERROR(CheckTensor(want, *have->second, source));
  }
  if (!missing.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": the tensor ", missing[0], " is missing",
                                                   missing.size() == 1 ? "" : absl::StrCat(" (and ", missing.size() - 1, " more)"),
                                                   ": the folder is incomplete or config.json belongs to another model; download the model again"));
  }
  for (const TensorInfo& tensor : present) {
    if (expected.count(tensor.name) == 0 && !IsIgnoredTensor(config, tensor.name)) {
      return absl::InvalidArgumentError(
          absl::StrCat(source, ": the tensor ", tensor.name,
                       " does not belong to a LlamaForCausalLM of this config.json: it would be ignored, and the model would compute something else"));
    }
  }
  return absl::OkStatus();
}

}  // namespace ppft::model
