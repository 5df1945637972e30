// A whole stage on the GPU against the same stage on the CPU: losses, gradients, training.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/gpu/gpu.h"
#include "tests/gpu/model.h"
#include "tests/worker/trainer/numeric_gradient.h"
#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {
namespace {

model::ModelConfig SmallConfig() { return ConfigOf(256, 704, 4, 8, 4, 32, 1000, /*tied=*/true); }

StageOptions Options(bool gpu, at::ScalarType compute, double dropout = 0.0) {
  StageOptions options;
  options.num_layers = 4;
  options.has_embedding = true;
  options.has_head = true;
  options.compute = compute;
  options.lora = {8, 2.0, dropout, 11, AllTargets()};
  options.head_chunk_rows = 64;
  if (gpu) {
    options.device = at::Device(at::kCUDA, 0);
    options.kernels = &Gpu().KernelsOf(0);
  }
  return options;
}

std::unique_ptr<StageModel> Make(const StageOptions& options) {
  auto stage = StageModel::Create(SmallConfig(), options, RandomSource(SmallConfig(), at::kFloat));
  EXPECT_TRUE(stage.ok()) << stage.status();
  // B is zero at first, which would hide A's gradient.
  int64_t seed = 1;
  for (Parameter& p : (*stage)->parameters()) {
    at::manual_seed(seed++);
    p.master.add_(at::randn(p.master.sizes(), at::kFloat).mul_(0.02).to(p.master.device()));
  }
  (*stage)->AdapterChanged();
  return *std::move(stage);
}

MicrobatchInput Input(int microbatch) {
  at::manual_seed(100 + microbatch);
  MicrobatchInput input;
  input.step = 3;
  input.microbatch = microbatch;
  input.cu_seqlens = {0, 100, 101, 190, 300};
  input.ids = at::randint(1000, {300}, at::kLong);
  input.target_rows = at::arange(5, 95, at::kLong);
  input.target_ids = input.ids.narrow(0, 6, 90).contiguous();
  input.loss_weight = 1.0;  // small gradients would be subnormal in fp16
  return input;
}

double TakeLoss(StageModel& stage) {
  const double loss = stage.loss_total().item<double>();
  stage.loss_total().zero_();
  return loss;
}

struct Result {
  double loss = 0;
  std::vector<at::Tensor> gradients;
};

Result StepOf(const std::vector<StageModel*>& stages) {
  Result result;
  for (const int m : {0, 1}) {
    at::Tensor hidden, gradient;
    for (StageModel* stage : stages) {
      auto out = stage->Forward(Input(m), hidden, true, nullptr);
      EXPECT_TRUE(out.ok()) << out.status();
      hidden = *out;
    }
    for (size_t s = stages.size(); s-- > 0;) {
      auto in = stages[s]->Backward(Input(m), gradient);
      EXPECT_TRUE(in.ok()) << in.status();
      gradient = *in;
    }
  }
  result.loss = TakeLoss(*stages.back());
  for (StageModel* stage : stages) {
    for (const Parameter& p : stage->parameters()) result.gradients.push_back(p.gradient.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true));
    stage->ZeroGradients();
  }
  return result;
}

double WorstGradient(const Result& a, const Result& b) {
  double worst = 0;
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    const double scale = b.gradients[i].abs().max().item<double>();
    worst = std::max(worst, (a.gradients[i] - b.gradients[i]).abs().max().item<double>() / scale);
  }
  return worst;
}

class CudaStageTest : public testing::Test {
 protected:
  void TearDown() override { Gpu().SetDeterministic(false); }
};

TEST_F(CudaStageTest, FloatsGiveTheCpusLossAndGradients) {
  for (const double dropout : {0.0, 0.1}) {
    const auto cpu = Make(Options(false, at::kFloat, dropout)), gpu = Make(Options(true, at::kFloat, dropout));
    const Result want = StepOf({cpu.get()}), got = StepOf({gpu.get()});
    EXPECT_GT(want.loss, 0);
    EXPECT_NEAR(got.loss, want.loss, 1e-5 * want.loss);
    EXPECT_LT(WorstGradient(got, want), 2e-4);
    EXPECT_EQ(gpu->activation_bytes(), 0);
  }
}

TEST_F(CudaStageTest, NarrowTypesFollow) {
  const auto cpu = Make(Options(false, at::kFloat));
  const Result want = StepOf({cpu.get()});
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    const auto gpu = Make(Options(true, type));
    const Result got = StepOf({gpu.get()});
    EXPECT_NEAR(got.loss, want.loss, 5e-3 * want.loss) << c10::toString(type);
    EXPECT_LT(WorstGradient(got, want), type == at::kHalf ? 3e-2 : 1e-1) << c10::toString(type);
  }
}

TEST_F(CudaStageTest, LossIsTheSameTakenAtOnceOrLater) {
  const auto gpu = Make(Options(true, at::kBFloat16));
  double now = 0;
  ASSERT_TRUE(gpu->Forward(Input(0), at::Tensor(), false, &now).ok());
  ASSERT_TRUE(gpu->Forward(Input(0), at::Tensor(), false, nullptr).ok());
  EXPECT_GT(now, 0.0);
  EXPECT_EQ(TakeLoss(*gpu), now);
}

TEST_F(CudaStageTest, TwoStagesAreOneToTheBitInDeterministicMode) {
  Gpu().SetDeterministic(true);
  StageOptions first = Options(true, at::kBFloat16, 0.1), second = first;
  first.num_layers = second.num_layers = 2;
  first.has_head = second.has_embedding = false;
  second.first_layer = 2;
  const auto whole = Make(Options(true, at::kBFloat16, 0.1)), a = Make(first), b = Make(second);
  // Make's noise numbers parameters from the stage's first: give the halves the whole's.
  const auto& all = whole->parameters();
  size_t at = 0;
  for (StageModel* stage : {a.get(), b.get()}) {
    for (Parameter& p : stage->parameters()) p.master.copy_(all[at++].master);
    stage->AdapterChanged();
  }
  const Result one = StepOf({whole.get()}), again = StepOf({whole.get()}), two = StepOf({a.get(), b.get()});
  EXPECT_EQ(one.loss, again.loss);
  EXPECT_EQ(one.loss, two.loss);
  for (size_t i = 0; i < one.gradients.size(); ++i) {
    EXPECT_TRUE(at::equal(one.gradients[i], again.gradients[i])) << all[i].name;
    EXPECT_TRUE(at::equal(one.gradients[i], two.gradients[i])) << all[i].name;
  }
}

// Documents of one micro-batch do not see each other: each has the loss and the gradient that it has alone.
TEST_F(CudaStageTest, PackedDocumentsAreTheSameAlone) {
  const std::vector<int32_t> borders = {0, 7, 100, 101, 190, 300};
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto gpu = Make(Options(true, type));
    // With the targets of one document alone, or of all (-1).
    const auto loss_of = [&](const at::Tensor& ids, const std::vector<int32_t>& cu_seqlens, int document) {
      MicrobatchInput input;
      input.cu_seqlens = cu_seqlens;
      input.ids = ids;
      std::vector<int64_t> rows;
      for (int d = 0; d + 1 < static_cast<int>(cu_seqlens.size()); ++d) {
        for (int64_t t = cu_seqlens[d]; t + 1 < cu_seqlens[d + 1] && (document < 0 || d == document); ++t) rows.push_back(t);
      }
      input.target_rows = at::empty({static_cast<int64_t>(rows.size())}, at::kLong);
      std::copy(rows.begin(), rows.end(), input.target_rows.data_ptr<int64_t>());
      input.target_ids = ids.index_select(0, input.target_rows + 1);
      EXPECT_TRUE(gpu->Forward(input, at::Tensor(), true, nullptr).ok());
      EXPECT_TRUE(gpu->Backward(input, at::Tensor()).ok());
      return TakeLoss(*gpu);
    };
    const auto take_gradients = [&] {
      Result result;
      for (const Parameter& p : gpu->parameters()) result.gradients.push_back(p.gradient.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true));
      gpu->ZeroGradients();
      return result;
    };
    const double tolerance = type == at::kFloat ? 1e-5 : type == at::kHalf ? 1e-3 : 5e-3;
    const at::Tensor ids = Input(0).ids;
    loss_of(ids, borders, -1);
    const Result packed = take_gradients();
    Result alone;
    for (int d = 0; d + 1 < static_cast<int>(borders.size()); ++d) {
      const int32_t size = borders[d + 1] - borders[d];
      const double inside = loss_of(ids, borders, d);
      gpu->ZeroGradients();
      const double loss = loss_of(ids.narrow(0, borders[d], size).contiguous(), {0, size}, -1);
      EXPECT_EQ(loss > 0, size > 1);
      EXPECT_NEAR(inside, loss, tolerance * loss) << c10::toString(type) << ", document " << d;
      const Result one = take_gradients();
      for (size_t i = 0; i < one.gradients.size(); ++i) {
        if (d == 0) alone.gradients.push_back(at::zeros_like(one.gradients[i]));
        alone.gradients[i].add_(one.gradients[i]);
      }
    }
    EXPECT_LT(WorstGradient(packed, alone), type == at::kFloat ? 2e-4 : type == at::kHalf ? 3e-2 : 1e-1) << c10::toString(type);
  }
}

TEST_F(CudaStageTest, OptimizerStepEqualsTheCpusAndRefreshesTheComputeCopies) {
  const auto stage = Make(Options(true, at::kBFloat16)), other = Make(Options(true, at::kBFloat16));
  StepOf({stage.get()});  // allocates
  FlatParameters flat = stage->flat_parameters();
  const auto optimizer = Gpu().MakeOptimizer(flat);
  ASSERT_EQ(flat.spans.size(), stage->parameters().size());
  double before = 0, after = 0, mirrored = 0;
  ASSERT_TRUE(stage->Forward(Input(0), at::Tensor(), true, &before).ok());
  ASSERT_TRUE(stage->Backward(Input(0), at::Tensor()).ok());
  const AdamWOptions options;
  optimizer->Step(options, 1, 1e-3, 1.0);
  ASSERT_TRUE(stage->Forward(Input(0), at::Tensor(), false, &after).ok());
  EXPECT_LT(after, before);
  // The copies that the step wrote are those that AdapterChanged makes.
  for (size_t i = 0; i < other->parameters().size(); ++i) other->parameters()[i].master.copy_(stage->parameters()[i].master);
  other->AdapterChanged();
  ASSERT_TRUE(other->Forward(Input(0), at::Tensor(), false, &mirrored).ok());
  EXPECT_EQ(mirrored, after);
  const at::Tensor squares = optimizer->GradientSquares().to(at::kCPU);
  for (size_t i = 0; i < stage->parameters().size(); ++i) {
    const double want = stage->parameters()[i].gradient.to(at::kCPU).to(at::kDouble).square().sum().item<double>();
    EXPECT_NEAR(squares[static_cast<int64_t>(i)].item<double>(), want, 1e-9 * want) << stage->parameters()[i].name;
  }
}

TEST_F(CudaStageTest, LogitsAndMergedTensorsComeToTheHost) {
  const auto cpu = Make(Options(false, at::kFloat)), gpu = Make(Options(true, at::kFloat));
  MicrobatchInput input = Input(0);
  input.training = false;
  const auto want = cpu->Logits(input, at::Tensor(), {0, 150, 299}), got = gpu->Logits(input, at::Tensor(), {0, 150, 299});
  ASSERT_TRUE(want.ok() && got.ok()) << got.status();
  ASSERT_TRUE(got->is_cpu());
  EXPECT_LT(RelativeError(*got, *want), 1e-4);
  std::vector<at::Tensor> merged;
  const auto keep = [&merged](const std::string&, const at::Tensor& t) {
    merged.push_back(t);
    return absl::OkStatus();
  };
  ASSERT_TRUE(cpu->ForEachMerged(at::kFloat, keep).ok());
  const size_t count = merged.size();
  ASSERT_TRUE(gpu->ForEachMerged(at::kFloat, keep).ok());
  ASSERT_EQ(merged.size(), 2 * count);
  for (size_t i = 0; i < count; ++i) EXPECT_LT(RelativeError(merged[count + i], merged[i]), 1e-6);
}

}  // namespace
}  // namespace ppft::trainer
