// A folder with a complete tiny Llama: config.json, safetensors, tokenizer.json. Weights are small numbers that follow from the tensor's name.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common/base/files.h"
#include "common/model/config.h"
#include "common/model/inventory.h"
#include "common/model/safetensors.h"
#include "nlohmann/json.hpp"

namespace ppft::coordinator {

inline nlohmann::json TinyConfig() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 16},
          {"intermediate_size", 24},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"vocab_size", 12},
          {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"tie_word_embeddings", true},
          {"torch_dtype", "float32"},
          {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

// Words "a" … "i" and three special tokens.
inline nlohmann::json TinyTokenizer() {
  using nlohmann::json;
  json vocab = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int i = 0; i < 9; ++i) vocab[std::string(1, static_cast<char>('a' + i))] = 3 + i;
  json added = json::array();
  for (const char* token : {"<unk>", "<s>", "</s>"}) {
    added.push_back(
        {{"id", vocab[token]}, {"content", token}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", true}});
  }
  return {{"version", "1.0"},          {"truncation", nullptr}, {"padding", nullptr},
          {"added_tokens", added},     {"normalizer", nullptr}, {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
          {"post_processor", nullptr}, {"decoder", nullptr},    {"model", {{"type", "WordLevel"}, {"vocab", vocab}, {"unk_token", "<unk>"}}}};
}

inline void PutFile(const std::string& folder, const std::string& name, const std::string& content) {
  const absl::Status status = WriteFileAtomic(JoinPath(folder, name), content);
  if (!status.ok()) std::abort();
}

// All tensors with some of them changed or left out by `edit` (false = leave out).
inline void PutWeights(const std::string& folder, const std::string& name, const model::ModelConfig& config,
                       const std::function<bool(model::TensorInfo&, std::string&)>& edit = nullptr) {
  std::vector<model::TensorInfo> infos;
  std::vector<std::string> bytes;
  for (const model::ExpectedTensor& tensor : model::ExpectedTensors(config)) {
    model::TensorInfo info{tensor.name, "F32", tensor.shape, 0, 0};
    int64_t count = 1;
    for (const int64_t dimension : tensor.shape) count *= dimension;
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) values[i] = 0.01f * static_cast<float>((i * 7 + std::hash<std::string>()(tensor.name)) % 101) - 0.5f;
    std::string raw(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    if (edit && !edit(info, raw)) continue;
    infos.push_back(info);
    bytes.push_back(raw);
  }
  std::string file = model::SafetensorsHeaderBytes(infos, {{"format", "pt"}});
  for (const std::string& raw : bytes) file += raw;
  PutFile(folder, name, file);
}

inline model::ModelConfig ParsedTinyConfig() { return model::ParseModelConfig(TinyConfig().dump(), "config.json").value(); }

inline void PutTinyModel(const std::string& folder) {
  if (!MakeDirs(folder).ok()) std::abort();
  PutFile(folder, "config.json", TinyConfig().dump());
  PutFile(folder, "tokenizer.json", TinyTokenizer().dump());
  PutFile(folder, "tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"})");
  PutWeights(folder, "model.safetensors", ParsedTinyConfig());
}

}  // namespace ppft::coordinator
