// Captured passes against the same passes done one launch after another: equal bits, whatever changes between two launches of one capture.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include "tests/gpu/gpu.h"
#include "tests/gpu/model.h"
#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {
namespace {

constexpr int64_t kVocab = 1000;

model::ModelConfig Config() { return ConfigOf(256, 704, 4, 8, 4, 32, kVocab, /*tied=*/true); }

// Stages of a pipeline on one device, each with its optimizer.
class Pipeline {
 public:
  Pipeline(bool capture, double dropout, model::ActivationCheckpointing checkpointing, int num_stages, at::ScalarType compute) {
    for (int s = 0; s < num_stages; ++s) {
      StageOptions options;
      options.stage = s;
      options.num_layers = 4 / num_stages;
      options.first_layer = s * options.num_layers;
      options.has_embedding = s == 0;
      options.has_head = s + 1 == num_stages;
      options.compute = compute;
      options.lora = {8, 2.0, dropout, 11, AllTargets()};
      options.checkpointing = checkpointing;
      options.head_chunk_rows = 100;
      options.least_tokens = 512;
      options.token_multiple = 64;
      options.capture = capture;
      options.device = at::Device(at::kCUDA, 0);
      options.kernels = &Gpu().KernelsOf(0);
      auto stage = StageModel::Create(Config(), options, RandomSource(Config(), at::kFloat));
      EXPECT_TRUE(stage.ok()) << stage.status();
      int64_t seed = 1000 * s;
      for (Parameter& p : (*stage)->parameters()) {
        at::manual_seed(++seed);
        p.master.add_(at::randn(p.master.sizes(), at::kFloat).mul_(0.02).to(p.master.device()));
      }
      (*stage)->AdapterChanged();
      stages_.push_back(*std::move(stage));
      optimizers_.push_back(Gpu().MakeOptimizer(stages_.back()->flat_parameters()));
    }
  }

  // Two micro-batches are in flight at a time, as in a pipeline.
  void Step(int64_t step, const std::vector<MicrobatchInput>& inputs) {
    for (size_t i = 0; i < inputs.size(); i += 2) {
      const size_t end = std::min(inputs.size(), i + 2);
      for (size_t m = i; m < end; ++m) {
        at::Tensor hidden;
        for (auto& stage : stages_) {
          auto out = stage->Forward(inputs[m], hidden, true, nullptr);
          ASSERT_TRUE(out.ok()) << out.status();
          hidden = *out;
        }
      }
      for (size_t m = i; m < end; ++m) {
        at::Tensor gradient;
        for (size_t s = stages_.size(); s-- > 0;) {
          auto in = stages_[s]->Backward(inputs[m], gradient);
          ASSERT_TRUE(in.ok()) << in.status();
          gradient = *in;
        }
      }
    }
    gradients.clear();
    loss = stages_.back()->loss_total().item<double>();
    stages_.back()->loss_total().zero_();
    for (size_t s = 0; s < stages_.size(); ++s) {
      gradients.push_back(stages_[s]->flat_parameters().gradient.clone());
      optimizers_[s]->Step(AdamWOptions(), step, 1e-3 / static_cast<double>(step), 0.5);
      stages_[s]->ZeroGradients();
    }
  }
  StageModel& last() { return *stages_.back(); }
  int64_t captured_launches() const {
    int64_t launches = 0;
    for (const auto& stage : stages_) launches += stage->captured_launches();
    return launches;
  }

  double loss = 0;
  std::vector<at::Tensor> gradients;

 private:
  std::vector<std::unique_ptr<StageModel>> stages_;
  std::vector<std::unique_ptr<DeviceOptimizer>> optimizers_;
};

// Five micro-batches of three shapes once they are padded; their documents, tokens, targets and weight differ in every step.
std::vector<MicrobatchInput> Inputs(int64_t step) {
  const std::vector<std::vector<int32_t>> documents = {{0, 200, 500}, {0, 333}, {0, 130, 131, 487}, {0, 90, 330}, {0, 61}};
  std::vector<MicrobatchInput> inputs;
  for (size_t m = 0; m < documents.size(); ++m) {
    MicrobatchInput input;
    input.step = step;
    input.microbatch = static_cast<int>(m);
    for (const int32_t border : documents[m]) input.cu_seqlens.push_back(border == 0 || border == 61 ? border : border - static_cast<int32_t>(step % 5));
    const int64_t tokens = input.cu_seqlens.back();
    at::manual_seed(100 * step + static_cast<int64_t>(m));
    input.ids = at::randint(kVocab, {tokens}, at::kLong);
    input.target_rows = at::arange(step % 3, tokens - 1, 1 + static_cast<int64_t>(m) % 2, at::kLong);
    input.target_ids = input.ids.index_select(0, input.target_rows + 1).contiguous();
    input.loss_weight = 0.01 * static_cast<double>(step);
    inputs.push_back(input);
  }
  return inputs;
}

class CudaCaptureTest : public testing::Test {
 protected:
  void SetUp() override { Gpu().SetDeterministic(true); }
  void TearDown() override { Gpu().SetDeterministic(false); }

  // What takes its documents from the host in each pass is not captured.
  static void ExpectEqualBits(double dropout, model::ActivationCheckpointing checkpointing, int num_stages, at::ScalarType compute = at::kBFloat16) {
    Pipeline plain(false, dropout, checkpointing, num_stages, compute), captured(true, dropout, checkpointing, num_stages, compute);
    double previous = 0;
    for (int64_t step = 1; step <= 8; ++step) {
      const std::vector<MicrobatchInput> inputs = Inputs(step);
      plain.Step(step, inputs);
      captured.Step(step, inputs);
      EXPECT_GT(plain.loss, 0);
      EXPECT_NE(plain.loss, previous);
      previous = plain.loss;
      ASSERT_EQ(captured.loss, plain.loss) << "step " << step;
      for (size_t s = 0; s < plain.gradients.size(); ++s) {
        EXPECT_GT(plain.gradients[s].abs().max().item<float>(), 0);
        ASSERT_TRUE(at::equal(captured.gradients[s], plain.gradients[s])) << "step " << step << ", stage " << s;
      }
    }
    EXPECT_EQ(plain.captured_launches(), 0);
    if (compute == at::kFloat) {
      EXPECT_EQ(captured.captured_launches(), 0);
    } else {
      EXPECT_GT(captured.captured_launches(), 20);
    }
  }
};

TEST_F(CudaCaptureTest, HasTheBitsOfSingleLaunches) { ExpectEqualBits(0.0, model::ActivationCheckpointing::kNone, 1); }
TEST_F(CudaCaptureTest, DocumentsMoveInFp32Too) { ExpectEqualBits(0.0, model::ActivationCheckpointing::kNone, 2, at::kFloat); }
TEST_F(CudaCaptureTest, DropoutDrawsNewNumbersInEachLaunch) { ExpectEqualBits(0.1, model::ActivationCheckpointing::kNone, 1); }
TEST_F(CudaCaptureTest, StagesHandOverTheRealRows) { ExpectEqualBits(0.1, model::ActivationCheckpointing::kNone, 2); }
TEST_F(CudaCaptureTest, BackwardMayRecompute) {
  ExpectEqualBits(0.1, model::ActivationCheckpointing::kFull, 2);
  ExpectEqualBits(0.0, model::ActivationCheckpointing::kSelective, 1);
}

// Before an export: captured work keeps memory that nothing else may use.
TEST_F(CudaCaptureTest, TheLastStepGivesItsMemoryBack) {
  Pipeline pipeline(true, 0.0, model::ActivationCheckpointing::kNone, 1, at::kBFloat16);
  for (int64_t step = 1; step <= 6; ++step) pipeline.Step(step, Inputs(step));
  EXPECT_GT(pipeline.captured_launches(), 0);
  MicrobatchInput probe = Inputs(7).back();
  probe.training = false;
  const auto before = pipeline.last().Logits(probe, at::Tensor(), {0, 60});
  ASSERT_TRUE(before.ok()) << before.status();
  const HeldBytes steps = pipeline.last().held_bytes();
  Gpu().ReleaseCachedMemory();
  const CudaMemory full = Gpu().Memory(0);
  pipeline.last().EndSteps();
  Gpu().ReleaseCachedMemory();
  const CudaMemory freed = Gpu().Memory(0);
  EXPECT_LE(freed.allocated_bytes, full.allocated_bytes - steps.activations - steps.scratch);
  EXPECT_LT(freed.reserved_bytes, full.reserved_bytes);
  const auto after = pipeline.last().Logits(probe, at::Tensor(), {0, 60});
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_TRUE(at::equal(*before, *after));
}

// Padding changes no sum: the gradients are those of the micro-batch as it is, up to the order in which the products add.
TEST_F(CudaCaptureTest, PaddingCountsForNothing) {
  std::vector<at::Tensor> gradients;
  for (const int64_t multiple : {1, 64}) {
    StageOptions options;
    options.num_layers = 4;
    options.has_embedding = options.has_head = true;
    options.compute = at::kBFloat16;
    options.lora = {8, 2.0, 0.0, 11, AllTargets()};
    options.token_multiple = multiple;
    options.device = at::Device(at::kCUDA, 0);
    options.kernels = &Gpu().KernelsOf(0);
    auto stage = StageModel::Create(Config(), options, RandomSource(Config(), at::kFloat));
    ASSERT_TRUE(stage.ok()) << stage.status();
    for (const MicrobatchInput& input : Inputs(2)) {
      ASSERT_TRUE((*stage)->Forward(input, at::Tensor(), true, nullptr).ok());
      ASSERT_TRUE((*stage)->Backward(input, at::Tensor()).ok());
    }
    gradients.push_back((*stage)->flat_parameters().gradient.clone());
    gradients.push_back((*stage)->loss_total().to(at::kFloat));
  }
  EXPECT_LT((gradients[0] - gradients[2]).abs().max().item<float>(), 0.02f * gradients[0].abs().max().item<float>());
  EXPECT_LT((gradients[1] - gradients[3]).abs().item<float>(), 1e-3f * gradients[1].item<float>());
}

}  // namespace
}  // namespace ppft::trainer
