// Every explicit backward pass of the model in fp64 against finite differences: adapters and the gradient that goes to the stage before.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "tests/worker/trainer/merged_input.h"
#include "tests/worker/trainer/numeric_gradient.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {
namespace {

model::ModelConfig SmallConfig(bool tied) {
  model::ModelConfig config;
  config.hidden_size = 12;
  config.intermediate_size = 10;
  config.num_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 4;
  config.vocab_size = 17;
  config.max_position_embeddings = 64;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 100;
  config.tie_word_embeddings = tied;
  return config;
}

TensorSource RandomSource(const model::ModelConfig& config) {
  at::manual_seed(3);
  auto tensors = std::make_shared<std::map<std::string, at::Tensor>>();
  for (const model::ExpectedTensor& t : model::ExpectedTensors(config)) (*tensors)[t.name] = at::randn(t.shape, at::kDouble) * 0.4;
  return [tensors](const std::string& name) -> absl::StatusOr<at::Tensor> {
    const auto it = tensors->find(name);
    if (it == tensors->end()) return absl::NotFoundError(name);
    return it->second;
  };
}

StageOptions Options(std::vector<std::string> targets, double dropout) {
  StageOptions options;
  options.compute = at::kDouble;
  options.lora = {2, 1.5, dropout, 11, std::move(targets)};
  options.head_chunk_rows = 3;
  return options;
}

MicrobatchInput Input(const model::ModelConfig& config) {
  MicrobatchInput input;
  input.step = 4;
  input.cu_seqlens = {0, 3, 6, 7, 11};
  input.ids = at::randint(config.vocab_size, {11}, at::kLong);
  input.target_rows = at::tensor({1, 3, 4, 7, 8, 9}, at::kLong);
  input.target_ids = at::randint(config.vocab_size, {6}, at::kLong);
  input.loss_weight = 0.125;
  return input;
}

void RandomizeAdapters(StageModel& stage) {
  for (const Parameter& p : stage.parameters()) p.master.normal_(0, 0.3);
  stage.AdapterChanged();
}

struct Case {
  const char* name;
  bool tied;
  std::vector<std::string> targets;
  double dropout;
};

class StageGradientTest : public testing::TestWithParam<Case> {};

TEST_P(StageGradientTest, WholeModelEqualsFiniteDifferences) {
  const model::ModelConfig config = SmallConfig(GetParam().tied);
  StageOptions options = Options(GetParam().targets, GetParam().dropout);
  options.num_layers = 2;
  options.has_embedding = options.has_head = true;
  auto stage = StageModel::Create(config, options, RandomSource(config));
  ASSERT_TRUE(stage.ok()) << stage.status();
  RandomizeAdapters(**stage);
  const MicrobatchInput input = Input(config);
  const auto f = [&] {
    double loss = 0;
    (*stage)->AdapterChanged();
    EXPECT_TRUE((*stage)->Forward(input, at::Tensor(), false, &loss).ok());
    return loss * input.loss_weight;
  };
  double loss = 0;
  ASSERT_TRUE((*stage)->Forward(input, at::Tensor(), true, &loss).ok());
  EXPECT_NEAR(loss * input.loss_weight, f(), 1e-12);
  EXPECT_GT((*stage)->activation_bytes(), 0);
  ASSERT_TRUE((*stage)->Backward(input, at::Tensor()).ok());
  EXPECT_EQ((*stage)->activation_bytes(), 0);
  EXPECT_EQ((*stage)->parameters().size(), 2 * 2 * GetParam().targets.size());
  for (const Parameter& p : (*stage)->parameters()) {
    EXPECT_LT(RelativeError(p.gradient, NumericGradient(p.master, f)), 1e-6) << p.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, StageGradientTest,
                         testing::Values(Case{"all", false, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 0.0},
                                         Case{"all_tied_dropout", true, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 0.3},
                                         Case{"some", false, {"k_proj", "up_proj"}, 0.0}, Case{"some_dropout", false, {"q_proj", "v_proj", "down_proj"}, 0.5}),
                         [](const auto& info) { return info.param.name; });

TEST(StageTest, MiddleStageGradientOfItsInputEqualsFiniteDifferences) {
  const model::ModelConfig config = SmallConfig(false);
  for (const double dropout : {0.0, 0.3}) {
    StageOptions options = Options({"q_proj", "v_proj", "o_proj", "up_proj", "down_proj"}, dropout);
    options.first_layer = 1;
    options.num_layers = 1;
    auto stage = StageModel::Create(config, options, RandomSource(config));
    ASSERT_TRUE(stage.ok()) << stage.status();
    RandomizeAdapters(**stage);
    const MicrobatchInput input = Input(config);
    const at::Tensor hidden = at::randn({11, 12}, at::kDouble), dout = at::randn({11, 12}, at::kDouble);
    const auto f = [&] {
      double unused = 0;
      (*stage)->AdapterChanged();
      return ((*stage)->Forward(input, hidden, false, &unused).value() * dout).sum().item<double>();
    };
    double unused = 0;
    ASSERT_TRUE((*stage)->Forward(input, hidden, true, &unused).ok());
    const auto dhidden = (*stage)->Backward(input, dout);
    ASSERT_TRUE(dhidden.ok()) << dhidden.status();
    EXPECT_LT(RelativeError(*dhidden, NumericGradient(hidden, f)), 1e-6);
    for (const Parameter& p : (*stage)->parameters()) EXPECT_LT(RelativeError(p.gradient, NumericGradient(p.master, f)), 1e-6) << p.name;
  }
}

TEST(StageTest, MicrobatchesInFlightDoNotDisturbEachOther) {
  const model::ModelConfig config = SmallConfig(false);
  StageOptions options = Options({"q_proj", "down_proj"}, 0.0);
  options.num_layers = 2;
  options.has_embedding = options.has_head = true;
  auto stage = StageModel::Create(config, options, RandomSource(config));
  ASSERT_TRUE(stage.ok());
  RandomizeAdapters(**stage);
  MicrobatchInput a = Input(config), b = Input(config);
  b.microbatch = 1;
  b.cu_seqlens = {0, 5};
  b.ids = b.ids.narrow(0, 0, 5);
  b.target_rows = at::tensor({0, 3}, at::kLong);
  b.target_ids = at::tensor({4, 2}, at::kLong);
  double loss = 0;
  const auto gradients = [&] {
    std::vector<at::Tensor> all;
    for (const Parameter& p : (*stage)->parameters()) all.push_back(p.gradient.clone());
    (*stage)->ZeroGradients();
    return all;
  };
  for (const MicrobatchInput* input : {&a, &b}) {
    ASSERT_TRUE((*stage)->Forward(*input, {}, true, &loss).ok());
    ASSERT_TRUE((*stage)->Backward(*input, {}).ok());
  }
  const std::vector<at::Tensor> serial = gradients();
  for (int repeat = 0; repeat < 3; ++repeat) {  // buffers are used again, in another order
    ASSERT_TRUE((*stage)->Forward(repeat % 2 ? b : a, {}, true, &loss).ok());
    ASSERT_TRUE((*stage)->Forward(repeat % 2 ? a : b, {}, true, &loss).ok());
    ASSERT_TRUE((*stage)->Forward(b, {}, false, &loss).ok());  // an evaluation in between
    ASSERT_TRUE((*stage)->Backward(a, {}).ok());
    ASSERT_TRUE((*stage)->Backward(b, {}).ok());
    const std::vector<at::Tensor> overlapped = gradients();
    for (size_t i = 0; i < serial.size(); ++i) EXPECT_TRUE(at::equal(serial[i], overlapped[i])) << (*stage)->parameters()[i].name;
  }
  EXPECT_EQ((*stage)->Backward(a, {}).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(StageTest, MergedMicrobatchesGiveTheSumOfTheirGradientsAlsoWithDropout) {
  const model::ModelConfig config = SmallConfig(true);
  for (const double dropout : {0.0, 0.4}) {
    StageOptions options = Options({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, dropout);
    options.num_layers = 2;
    options.has_embedding = options.has_head = true;
    auto stage = StageModel::Create(config, options, RandomSource(config));
    ASSERT_TRUE(stage.ok()) << stage.status();
    RandomizeAdapters(**stage);
    std::vector<MicrobatchInput> inputs(3, Input(config));
    inputs[0].microbatch = 2;
    inputs[1].microbatch = 5;
    inputs[1].cu_seqlens = {0, 5};
    inputs[1].ids = inputs[1].ids.narrow(0, 4, 5);
    inputs[1].target_rows = at::tensor({0, 3}, at::kLong);
    inputs[1].target_ids = at::tensor({4, 2}, at::kLong);
    inputs[2].microbatch = 7;
    inputs[2].ids = at::randint(config.vocab_size, {11}, at::kLong);
    const auto train = [&](const std::vector<MicrobatchInput>& passes, double* loss) {
      (*stage)->ZeroGradients();
      *loss = 0;
      for (const MicrobatchInput& input : passes) {
        EXPECT_TRUE((*stage)->Forward(input, {}, true, loss).ok());
        EXPECT_TRUE((*stage)->Backward(input, {}).ok());
      }
      std::vector<at::Tensor> gradients;
      for (const Parameter& p : (*stage)->parameters()) gradients.push_back(p.gradient.flatten());
      return at::cat(gradients);
    };
    double apart_loss = 0, loss = 0;
    const at::Tensor apart = train(inputs, &apart_loss);
    for (const auto& passes : {std::vector<MicrobatchInput>{MergedInput(inputs)}, {MergedInput({inputs[0], inputs[1]}), inputs[2]}}) {
      EXPECT_LT(RelativeError(train(passes, &loss), apart), 1e-12) << "dropout " << dropout;
      EXPECT_NEAR(loss, apart_loss, 1e-12 * apart_loss);
    }
    // Rows that draw as if all were of one micro-batch have other masks.
    MicrobatchInput together = MergedInput(inputs);
    together.merged.clear();
    EXPECT_EQ(RelativeError(train({together}, &loss), apart) < 1e-6, dropout == 0);
    together.merged = {{0, 26}};
    EXPECT_EQ((*stage)->Forward(together, {}, true, &loss).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(StageTest, BadInputIsAStatusThatNamesIt) {
  const model::ModelConfig config = SmallConfig(false);
  StageOptions options = Options({"q_proj"}, 0.0);
  options.num_layers = 2;
  options.has_embedding = options.has_head = true;
  const TensorSource source = RandomSource(config);
  const TensorSource wrong = [&](const std::string& name) -> absl::StatusOr<at::Tensor> {
    if (name == "model.layers.1.mlp.up_proj.weight") return at::randn({10, 11}, at::kFloat);
    return source(name);
  };
  EXPECT_EQ(StageModel::Create(config, options, wrong).status().message(),
            "model.layers.1.mlp.up_proj.weight has the shape [10, 11], but config.json asks for [10, 12]");
  StageOptions beyond = options;
  beyond.first_layer = 1;
  EXPECT_EQ(StageModel::Create(config, beyond, source).status().code(), absl::StatusCode::kInvalidArgument);
  StageOptions unknown = options;
  unknown.lora.target_modules = {"qproj"};
  EXPECT_EQ(StageModel::Create(config, unknown, source).status().code(), absl::StatusCode::kInvalidArgument);

  auto stage = StageModel::Create(config, options, source);
  ASSERT_TRUE(stage.ok());
  double loss = 0;
  MicrobatchInput input = Input(config);
  input.cu_seqlens.back() = 12;  // one more than ids
  EXPECT_EQ((*stage)->Forward(input, {}, true, &loss).status().code(), absl::StatusCode::kInvalidArgument);
  input = Input(config);
  input.target_ids[2] = 17;
  EXPECT_THAT(std::string((*stage)->Forward(input, {}, true, &loss).status().message()), testing::HasSubstr("target 17 is outside the vocabulary of 17"));
}

}  // namespace
}  // namespace ppft::trainer
