// Tensor inventory, costs and PEFT's files.
#include "common/model/inventory.h"

#include <set>
#include <string>
#include <vector>

#include "common/model/cost.h"
#include "common/model/peft.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace ppft::model {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

ModelConfig Llama1B() {
  ModelConfig c;
  c.hidden_size = 2048;
  c.intermediate_size = 8192;
  c.num_layers = 16;
  c.num_attention_heads = 32;
  c.num_key_value_heads = 8;
  c.head_dim = 64;
  c.vocab_size = 128256;
  c.tie_word_embeddings = true;
  return c;
}

std::vector<TensorInfo> Present(const ModelConfig& c) {
  std::vector<TensorInfo> out;
  for (const ExpectedTensor& t : ExpectedTensors(c)) out.push_back({t.name, "BF16", t.shape, 0, 0});
  return out;
}

TEST(Inventory, StagesTogetherHoldTheModelAndTheTiedHeadTwice) {
  const ModelConfig c = Llama1B();
  EXPECT_EQ(ExpectedTensors(c).size(), 16u * 9 + 2);
  const auto first = TensorsOfStage(c, 0, 10, true, false);
  const auto last = TensorsOfStage(c, 10, 6, false, true);
  EXPECT_EQ(first.size() + last.size(), 16u * 9 + 3);
  EXPECT_EQ(last.back().name, kEmbeddingName);
  ModelConfig untied = c;
  untied.tie_word_embeddings = false;
  EXPECT_EQ(TensorsOfStage(untied, 10, 6, false, true).back().name, kHeadName);
  EXPECT_EQ(ExpectedTensors(untied).size(), 16u * 9 + 3);
  EXPECT_THAT(ShapeOfModule(c, "k_proj").out, 512);
}

TEST(Inventory, ChecksNamesShapesAndTypes) {
  const ModelConfig c = Llama1B();
  EXPECT_TRUE(CheckInventory(c, Present(c), "m").ok());
  auto with = Present(c);
  with.push_back({"lm_head.weight", "BF16", {c.vocab_size, c.hidden_size}, 0, 0});
  with.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {32}, 0, 0});
  EXPECT_TRUE(CheckInventory(c, with, "m").ok());

  auto tensors = Present(c);
  tensors.erase(tensors.begin() + 5);
  EXPECT_THAT(std::string(CheckInventory(c, tensors, "m").message()), HasSubstr("m: the tensor model.layers.0.mlp.gate_proj.weight is missing"));
  tensors = Present(c);
  tensors[3].shape = {512, 4096};
  EXPECT_THAT(std::string(CheckInventory(c, tensors, "m").message()), HasSubstr("[512, 4096], but config.json asks for [512, 2048]"));
  tensors = Present(c);
  tensors[3].dtype = "F8_E4M3";
  EXPECT_THAT(std::string(CheckInventory(c, tensors, "m").message()), HasSubstr("F8_E4M3"));
  tensors = Present(c);
  tensors.push_back({"model.layers.0.self_attn.q_proj.bias", "BF16", {2048}, 0, 0});
  EXPECT_THAT(std::string(CheckInventory(c, tensors, "m").message()), HasSubstr("q_proj.bias"));
}

TEST(Cost, MatchesThePublishedFigureOfThe1B) {
  const ModelConfig c = Llama1B();
  const LoraShape lora{16, TargetModules()};
  EXPECT_EQ(TotalParameters(c), 1235814400);  // Llama-3.2-1B
  EXPECT_EQ(16 * AdapterParametersOfLayer(c, lora), 11272192);
  const Flops layer = LayerFlops(c, lora, 1, 2048);
  const double per_token = 16 * (layer.forward + layer.backward) + HeadFlops(c, 1).forward;
  EXPECT_NEAR(per_token / 1e9, 5.41, 0.01);
}

// Found by traces of two H200s, micro-batches of 2 x 2048: a layer 2.34 to 2.41 ms, 0.96 to 0.99 of them forward, the head with its loss 6.3.
TEST(Cost, TimeOnGpusIsThatOfTraces) {
  const ModelConfig c = Llama1B();
  const LoraShape lora{16, TargetModules()};
  const auto milliseconds = [](double cost) { return cost / 750e9; };
  const Flops layer = LayerTimeOnGpu(c, lora, 4096, 2048), head = HeadTimeOnGpu(c, 4096);
  EXPECT_NEAR(milliseconds(layer.forward), 0.98, 0.1);
  EXPECT_NEAR(milliseconds(layer.forward + layer.backward), 2.37, 0.1);
  EXPECT_NEAR(milliseconds(head.forward + head.backward), 6.3, 0.4);
}

json Good() {
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"r", 8},
          {"lora_alpha", 16},
          {"lora_dropout", 0.0},
          {"bias", "none"},
          {"target_modules", {"v_proj", "q_proj"}},
          {"use_dora", false},
          {"rank_pattern", json::object()},
          {"modules_to_save", nullptr},
          {"some_new_feature", nullptr},
          {"megatron_core", "megatron.core"},
          {"qalora_group_size", 16}};
}

TEST(Peft, ReadsListsPathsAndAllLinear) {
  auto c = ParseAdapterConfig(Good().dump(), "a");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_THAT(c->target_modules, ElementsAre("q_proj", "v_proj"));
  EXPECT_EQ(c->scale(), 2.0);
  json j = Good();
  j["target_modules"] = "all-linear";
  j["use_rslora"] = true;
  c = ParseAdapterConfig(j.dump(), "a");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->target_modules, TargetModules());
  EXPECT_NEAR(c->scale(), 16 / 2.8284271247461903, 1e-12);
  j["target_modules"] = {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"};
  c = ParseAdapterConfig(j.dump(), "a");
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_THAT(c->target_modules, ElementsAre("q_proj", "up_proj"));
}

TEST(Peft, RefusesWhatItCannotHonour) {
  const std::pair<const char*, json> cases[] = {
      {"peft_type", "IA3"},
      {"peft_type", nullptr},
      {"task_type", "SEQ_CLS"},
      {"r", 0},
      {"r", 1025},
      {"r", 8.5},
      {"r", nullptr},
      {"lora_alpha", 0},
      {"lora_alpha", "16"},
      {"lora_dropout", 1.0},
      {"bias", "all"},
      {"use_dora", true},
      {"rank_pattern", {{"q_proj", 4}}},
      {"modules_to_save", json::array({"lm_head"})},
      {"layers_to_transform", json::array({1})},
      {"fan_in_fan_out", true},
      {"some_new_feature", 3},
      {"trainable_token_indices", json::array({1})},
      {"init_lora_weights", "pissa"},
      {"target_modules", ".*q_proj"},
      {"target_modules", nullptr},
      {"target_modules", json::array()},
      {"target_modules", json::array({"lm_head"})},
      {"target_modules", json::array({"c_attn"})},
      {"target_modules", json::array({"mlp.q_proj"})},
      {"target_modules", json::array({"model.layers.1.self_attn.q_proj"})},
      {"target_modules", json::array({"model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"})},
      {"target_modules", json::array({"model.layers.0.self_attn.q_proj", "k_proj"})},
  };
  for (const auto& [key, value] : cases) {
    json j = Good();
    j[key] = value;
    const auto c = ParseAdapterConfig(j.dump(), "dir/adapter_config.json");
    ASSERT_EQ(c.status().code(), absl::StatusCode::kInvalidArgument) << key << " " << value;
    EXPECT_THAT(std::string(c.status().message()), HasSubstr("dir/adapter_config.json: "));
    EXPECT_THAT(std::string(c.status().message()), HasSubstr(key));
  }
}

TEST(Peft, WritesIntegerAlphaAndReadsItBack) {
  AdapterConfig c;
  c.r = 8;
  c.lora_alpha = 16;
  c.lora_dropout = 0.05;
  c.target_modules = {"q_proj"};
  c.base_model = "m";
  const std::string text = AdapterConfigText(c);
  EXPECT_THAT(text, HasSubstr("\"lora_alpha\": 16,"));
  EXPECT_THAT(text, HasSubstr("\"lora_dropout\": 0.05,"));
  const auto back = ParseAdapterConfig(text, "a");
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->lora_alpha, 16);
  EXPECT_EQ(back->base_model, "m");
  c.lora_alpha = 16.5;
  EXPECT_THAT(AdapterConfigText(c), HasSubstr("\"lora_alpha\": 16.5,"));
}

TEST(Peft, AnAdapterOfAnotherModelIsFound) {
  ModelConfig m = Llama1B();
  m.num_layers = 2;
  AdapterConfig a;
  a.r = 4;
  a.target_modules = {"q_proj", "down_proj"};
  SafetensorsHeader file;
  for (const ExpectedTensor& t : AdapterTensors(m, 4, a.target_modules)) file.tensors.push_back({t.name, "F32", t.shape, 0, 0});
  ASSERT_EQ(file.tensors.size(), 8u);
  EXPECT_EQ(file.tensors[0].name, "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight");
  EXPECT_TRUE(CheckAdapterFits(a, file, m, "a").ok());
  m.num_layers = 1;
  EXPECT_THAT(std::string(CheckAdapterFits(a, file, m, "a").message()), HasSubstr("does not belong"));
  m.num_layers = 3;
  EXPECT_THAT(std::string(CheckAdapterFits(a, file, m, "a").message()), HasSubstr("missing"));
  m.num_layers = 2;
  m.hidden_size = 1024;
  EXPECT_THAT(std::string(CheckAdapterFits(a, file, m, "a").message()), HasSubstr("another model"));
}

}  // namespace
}  // namespace ppft::model
