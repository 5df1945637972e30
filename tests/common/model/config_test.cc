// ParseModelConfig: what is read, what is refused, and that a refusal names file, field and remedy.
#include "common/model/config.h"

#include <cstdlib>
#include <string>

#include "common/base/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace ppft::model {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

json Good() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": true, "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2})");
}

json Llama3(const char* type_key = "rope_type") {
  return {{type_key, "llama3"}, {"factor", 32.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 256}};
}

TEST(ModelConfig, ReadsTheKeysOfTransformers4) {
  json j = Good();
  j["rope_scaling"] = Llama3("type");
  const auto c = ParseModelConfig(j.dump(), "config.json");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->head_dim, 8);
  EXPECT_EQ(c->key_value_size(), 32);
  EXPECT_EQ(c->dtype, "float32");
  EXPECT_TRUE(c->tie_word_embeddings);
  ASSERT_TRUE(c->rope_scaling.has_value());
  EXPECT_EQ(c->rope_scaling->factor, 32.0);
  EXPECT_EQ(c->rope_scaling->original_max_position_embeddings, 256);
  EXPECT_EQ(*c->bos_token_id, 1);
  EXPECT_THAT(c->eos_token_ids, ElementsAre(2));
}

TEST(ModelConfig, ReadsTheKeysOfTransformers5) {
  json j = Good();
  j.erase("rope_theta");
  j.erase("torch_dtype");
  j["dtype"] = "bfloat16";
  j["rope_parameters"] = Llama3();
  j["rope_parameters"]["rope_theta"] = 500000.0;
  j["eos_token_id"] = {2, 3};
  const auto c = ParseModelConfig(j.dump(), "config.json");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->rope_theta, 500000.0);
  EXPECT_EQ(c->dtype, "bfloat16");
  EXPECT_TRUE(c->rope_scaling.has_value());
  EXPECT_THAT(c->eos_token_ids, ElementsAre(2, 3));
}

TEST(ModelConfig, DefaultsAreTransformers) {
  json j = Good();
  for (const char* key :
       {"num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "torch_dtype", "bos_token_id", "eos_token_id", "max_position_embeddings"})
    j.erase(key);
  j["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 10000.0}};
  j["rope_scaling"] = nullptr;
  const auto c = ParseModelConfig(j.dump(), "config.json");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->num_key_value_heads, 8);
  EXPECT_EQ(c->rms_norm_eps, 1e-6);
  EXPECT_EQ(c->max_position_embeddings, 2048);
  EXPECT_FALSE(c->tie_word_embeddings);
  EXPECT_FALSE(c->rope_scaling.has_value());
  EXPECT_FALSE(c->bos_token_id.has_value());
}

TEST(ModelConfig, HeadsMayBeWiderThanHidden) {
  json j = Good();
  j["head_dim"] = 16;
  const auto c = ParseModelConfig(j.dump(), "config.json");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->query_size(), 128);
}

struct Refusal {
  const char* field;
  json value;
  const char* word;
};

TEST(ModelConfig, RefusalsNameFileFieldAndRemedy) {
  json yarn = {{"rope_type", "yarn"}, {"factor", 4.0}};
  json no_factor = Llama3();
  no_factor.erase("factor");
  json crossed = Llama3();
  crossed["low_freq_factor"] = 8.0;
  const Refusal cases[] = {
      {"architectures", json::array({"BertForMaskedLM"}), "LlamaForCausalLM"},
      {"architectures", json::array({"OmniSpeechLlamaForCausalLM"}), "LlamaForCausalLM"},
      {"architectures", nullptr, "missing"},
      {"architectures", "LlamaForCausalLM", "not supported"},
      {"model_type", "mistral", "llama"},
      {"attention_bias", true, "bias"},
      {"attention_bias", 1, "true or false"},
      {"mlp_bias", true, "bias"},
      {"hidden_act", "gelu", "silu"},
      {"attention_dropout", 0.1, "0.0"},
      {"quantization_config", {{"load_in_8bit", true}}, "quantized"},
      {"auto_map", {{"AutoModel", "x.Y"}}, "code"},
      {"num_local_experts", 8, "experts"},
      {"sliding_window", 4096, "full attention"},
      {"layer_types", json::array({"sliding_attention"}), "full_attention"},
      {"rope_scaling", yarn, "llama3"},
      {"rope_parameters", yarn, "llama3"},
      {"rope_scaling", no_factor, "factor"},
      {"rope_scaling", crossed, "high_freq_factor"},
      {"rope_scaling", "linear", "object"},
      {"rope_theta", -1, "above 0"},
      {"rope_theta", "1e4", "above 0"},
      {"rms_norm_eps", 0, "above 0"},
      {"hidden_size", nullptr, "missing"},
      {"hidden_size", 0, "integer"},
      {"hidden_size", -64, "integer"},
      {"hidden_size", 64.5, "integer"},
      {"hidden_size", "64", "integer"},
      {"hidden_size", uint64_t{1} << 63, "integer"},
      {"hidden_size", int64_t{1} << 40, "integer"},
      {"num_hidden_layers", 1000000, "integer"},
      {"num_key_value_heads", 3, "divide"},
      {"num_attention_heads", 12, "divide"},
      {"head_dim", 7, "even"},
      {"vocab_size", 1, "integer"},
      {"eos_token_id", 512, "integer"},
      {"eos_token_id", json::array({2, 600}), "token ids"},
      {"torch_dtype", "int8", "bfloat16"},
      {"tie_word_embeddings", "yes", "true or false"},
  };
  for (const Refusal& r : cases) {
    json j = Good();
    j[r.field] = r.value;
    const auto c = ParseModelConfig(j.dump(), "dir/config.json");
    ASSERT_EQ(c.status().code(), absl::StatusCode::kInvalidArgument) << r.field << " " << r.value;
    EXPECT_THAT(std::string(c.status().message()), HasSubstr("dir/config.json: "));
    EXPECT_THAT(std::string(c.status().message()), HasSubstr(r.word)) << r.field << " " << r.value;
  }
}

TEST(ModelConfig, RefusesBrokenJson) {
  const std::string deep = std::string(100000, '[');
  for (const std::string& text : {std::string("{"), std::string(""), std::string("[]"), std::string("{} {}"), std::string("{\"hidden_size\": 1e999}"),
                                  std::string("{\"a\": 1, \"a\": 2}"), std::string("{\"a\": \"\xff\"}"), std::string("null"), deep, std::string("\0", 1)}) {
    const auto c = ParseModelConfig(text, "config.json");
    ASSERT_EQ(c.status().code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 40);
    EXPECT_THAT(std::string(c.status().message()), HasSubstr("config.json: "));
  }
}

TEST(ModelConfig, RealConfigFiles) {
  const char* env = std::getenv("PPFT_ASSETS");
  const std::string folder = JoinPath(env != nullptr ? env : "../shared/assets", "configs");
  const auto names = ListDir(folder);
  if (!names.ok()) GTEST_SKIP() << "no asset folder " << folder << " (set PPFT_ASSETS)";
  int good = 0, refused = 0;
  for (const std::string& name : *names) {
    const auto text = ReadFile(JoinPath(folder, name));
    ASSERT_TRUE(text.ok()) << text.status();
    const auto c = ParseModelConfig(*text, name);
    const bool is_llama = (name.rfind("Llama", 0) == 0 || name.rfind("TinyLlama", 0) == 0) && name.find("must_refuse") == std::string::npos;
    EXPECT_EQ(c.ok(), is_llama) << name << ": " << c.status();
    (c.ok() ? good : refused)++;
  }
  EXPECT_GT(good, 0);
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace ppft::model
