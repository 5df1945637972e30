// One training run cut at one and at two stages: in deterministic mode every number is the same to the bit, and the first that is not is named.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tests/gpu/gpu.h"
#include "tests/gpu/model.h"
#include "tests/worker/trainer/merged_input.h"
#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {
namespace {

constexpr int kSteps = 3;
constexpr int kMicrobatches = 4;
constexpr int64_t kVocab = 32000;

// Four layers of the 1B shape.
model::ModelConfig Config() { return ConfigOf(2048, 8192, 4, 32, 8, 64, kVocab, /*tied=*/true); }

struct Named {
  std::string name;
  at::Tensor value;
};

// What a run leaves behind, in the order in which it was made. Copied on the device, so that nothing waits that would not wait in training.
using Trace = std::vector<Named>;

MicrobatchInput Input(int step, int microbatch, bool ragged) {
  at::manual_seed(1000 * step + microbatch);
  const int64_t tokens = 512;
  MicrobatchInput input;
  input.step = step;
  input.microbatch = microbatch;
  input.cu_seqlens = ragged ? std::vector<int32_t>{0, 100, 101, 190, 512} : std::vector<int32_t>{0, 512};
  input.ids = at::randint(kVocab, {tokens}, at::kLong);
  std::vector<int64_t> rows;
  for (size_t d = 0; d + 1 < input.cu_seqlens.size(); ++d) {
    for (int64_t t = input.cu_seqlens[d]; t + 1 < input.cu_seqlens[d + 1]; ++t) rows.push_back(t);
  }
  input.target_rows = at::empty({static_cast<int64_t>(rows.size())}, at::kLong);
  std::copy(rows.begin(), rows.end(), input.target_rows.data_ptr<int64_t>());
  input.target_ids = input.ids.index_select(0, input.target_rows + 1);
  input.loss_weight = 1.0 / static_cast<double>(kMicrobatches * rows.size());
  return input;
}

class Pipeline {
 public:
  Pipeline(int num_stages, double dropout, bool ragged, at::ScalarType compute, bool capture = false) : ragged_(ragged) {
    const model::ModelConfig config = Config();
    for (int s = 0; s < num_stages; ++s) {
      StageOptions options;
      options.stage = s;
      options.num_layers = static_cast<int>(config.num_layers) / num_stages;
      options.first_layer = s * options.num_layers;
      options.has_embedding = s == 0;
      options.has_head = s + 1 == num_stages;
      options.compute = compute;
      options.lora = {16, 2.0, dropout, 11, AllTargets()};
      options.head_chunk_rows = 2048;
      // As the trainer has them for small micro-batches.
      options.least_tokens = 512;
      options.token_multiple = 64;
      options.capture = capture;
      options.device = at::Device(at::kCUDA, 0);
      options.kernels = &Gpu().KernelsOf(0);
      auto stage = StageModel::Create(config, options, RandomSource(config, OnGpu(at::kFloat)));
      EXPECT_TRUE(stage.ok()) << stage.status();
      optimizers_.push_back(Gpu().MakeOptimizer((*stage)->flat_parameters()));
      stages_.push_back(*std::move(stage));
    }
  }

  Trace Train() {
    for (int step = 1; step <= kSteps; ++step) Step(step);
    return std::move(trace_);
  }

  // Loss and gradients of a step through one stage, `per_pass` micro-batches at a time; after a step that has moved the adapters away from zero.
  Trace TrainMerged(size_t per_pass) {
    Step(1);
    trace_.clear();
    std::vector<MicrobatchInput> inputs;
    for (int m = 0; m < kMicrobatches; ++m) inputs.push_back(Input(2, m, ragged_ || m == 1));
    stages_[0]->ZeroGradients();
    stages_[0]->loss_total().zero_();
    for (size_t begin = 0; begin < inputs.size(); begin += per_pass) {
      const size_t end = std::min(inputs.size(), begin + per_pass);
      const MicrobatchInput pass = MergedInput({inputs.begin() + static_cast<int64_t>(begin), inputs.begin() + static_cast<int64_t>(end)});
      EXPECT_TRUE(stages_[0]->Forward(pass, at::Tensor(), true, nullptr).ok());
      EXPECT_TRUE(stages_[0]->Backward(pass, at::Tensor()).ok());
    }
    Note("loss", stages_[0]->loss_total());
    NoteParameters("gradient", &Parameter::gradient);
    return std::move(trace_);
  }

 private:
  void Note(const std::string& name, const at::Tensor& value) { trace_.push_back({name, value.clone()}); }

  // hidden or gradient between two stages, as a transport would carry it: a copy elsewhere.
  void Forward(size_t s, const MicrobatchInput& input, std::vector<at::Tensor>& hidden) {
    const auto m = static_cast<size_t>(input.microbatch);
    auto out = stages_[s]->Forward(input, hidden[m], true, nullptr);
    ASSERT_TRUE(out.ok()) << out.status();
    hidden[m] = out->defined() ? out->clone() : at::Tensor();
    if (s + 1 == stages_.size()) Note(absl::StrCat("step ", input.step, ", micro-batch ", m, ": loss so far"), stages_[s]->loss_total());
  }

  void Backward(size_t s, const MicrobatchInput& input, std::vector<at::Tensor>& gradient) {
    const auto m = static_cast<size_t>(input.microbatch);
    auto in = stages_[s]->Backward(input, gradient[m]);
    ASSERT_TRUE(in.ok()) << in.status();
    gradient[m] = in->defined() ? in->clone() : at::Tensor();
  }

  // Of all stages, so that a trace has one order whatever the cut.
  void NoteParameters(const std::string& what, at::Tensor Parameter::*tensor) {
    for (const auto& stage : stages_) {
      for (const Parameter& p : stage->parameters()) Note(absl::StrCat(what, " of ", p.name), p.*tensor);
    }
  }

  void Step(int step) {
    std::vector<MicrobatchInput> inputs;
    for (int m = 0; m < kMicrobatches; ++m) inputs.push_back(Input(step, m, ragged_ || m == 1));
    for (const auto& stage : stages_) stage->ZeroGradients();
    stages_.back()->loss_total().zero_();
    std::vector<at::Tensor> hidden(kMicrobatches), gradient(kMicrobatches);
    // 1F1B: the first of two stages is one forward pass ahead.
    const size_t last = stages_.size() - 1;
    if (last > 0) Forward(0, inputs[0], hidden);
    for (size_t m = 0; m < inputs.size(); ++m) {
      if (last > 0 && m + 1 < inputs.size()) Forward(0, inputs[m + 1], hidden);
      Forward(last, inputs[m], hidden);
      Backward(last, inputs[m], gradient);
      if (last > 0) Backward(0, inputs[m], gradient);
      NoteParameters(absl::StrFormat("step %d, after micro-batch %d: gradient", step, m), &Parameter::gradient);
    }
    double squares = 0;
    std::vector<at::Tensor> all;
    for (const auto& optimizer : optimizers_) all.push_back(optimizer->GradientSquares());
    const at::Tensor host = at::cat(all).to(at::kCPU);
    for (int64_t i = 0; i < host.numel(); ++i) squares += host.data_ptr<double>()[i];
    Note(absl::StrCat("step ", step, ": squares of the gradients"), host);
    for (const auto& optimizer : optimizers_) optimizer->Step(AdamWOptions(), step, 2e-4, ClipFactor(std::sqrt(squares), 1.0));
    NoteParameters(absl::StrFormat("step %d: master", step), &Parameter::master);
  }

  const bool ragged_;
  std::vector<std::unique_ptr<StageModel>> stages_;
  std::vector<std::unique_ptr<DeviceOptimizer>> optimizers_;
  Trace trace_;
};

// "" if they are the same to the bit.
std::string FirstDifference(const Trace& a, const Trace& b) {
  if (a.size() != b.size()) return absl::StrCat(a.size(), " and ", b.size(), " values");
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].name != b[i].name) return absl::StrCat("\"", a[i].name, "\" and \"", b[i].name, "\"");
    if (at::equal(a[i].value, b[i].value)) continue;
    const at::Tensor x = a[i].value.to(at::kCPU).to(at::kDouble), y = b[i].value.to(at::kCPU).to(at::kDouble);
    return absl::StrFormat("value %d of %d, %s: %d of %d elements differ, by at most %.3g where the largest is %.3g", i, a.size(), a[i].name,
                           x.ne(y).sum().item<int64_t>(), x.numel(), (x - y).abs().max().item<double>(), x.abs().max().item<double>());
  }
  return "";
}

class CudaLayoutTest : public testing::Test {
 protected:
  void SetUp() override { Gpu().SetDeterministic(true); }
  void TearDown() override { Gpu().SetDeterministic(false); }
};

TEST_F(CudaLayoutTest, TwoRunsHaveTheSameBits) {
  const Trace first = Pipeline(1, 0.0, false, at::kBFloat16).Train();
  EXPECT_EQ(FirstDifference(first, Pipeline(1, 0.0, false, at::kBFloat16).Train()), "");
  EXPECT_GT(first.back().value.abs().max().item<float>(), 0.0f) << first.back().name << " never moved";
}

TEST_F(CudaLayoutTest, TwoStagesAreOneToTheBit) {
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf, at::kFloat}) {
    EXPECT_EQ(FirstDifference(Pipeline(1, 0.0, false, type).Train(), Pipeline(2, 0.0, false, type).Train()), "") << c10::toString(type);
  }
}

TEST_F(CudaLayoutTest, WithDropoutAndRaggedDocumentsToo) {
  EXPECT_EQ(FirstDifference(Pipeline(1, 0.1, true, at::kBFloat16).Train(), Pipeline(2, 0.1, true, at::kBFloat16).Train()), "");
}

TEST_F(CudaLayoutTest, CapturedPassesToo) {
  for (const bool ragged : {false, true}) {
    const Trace plain = Pipeline(1, 0.0, ragged, at::kBFloat16).Train();
    EXPECT_EQ(FirstDifference(plain, Pipeline(1, 0.0, ragged, at::kBFloat16, /*capture=*/true).Train()), "") << "ragged " << ragged;
    EXPECT_EQ(FirstDifference(plain, Pipeline(2, 0.0, ragged, at::kBFloat16, /*capture=*/true).Train()), "") << "two stages, ragged " << ragged;
  }
}

// The same sums in another order, and the same masks.
TEST_F(CudaLayoutTest, MergedMicrobatchesGiveTheSameGradients) {
  for (const auto& [type, tolerance] : {std::pair(at::kFloat, 2e-5), std::pair(at::kBFloat16, 0.05)}) {
    for (const double dropout : {0.0, 0.1}) {
      const Trace apart = Pipeline(1, dropout, true, type).TrainMerged(1);
      for (const size_t per_pass : {size_t{3}, size_t{4}}) {
        const Trace merged = Pipeline(1, dropout, true, type, /*capture=*/true).TrainMerged(per_pass);
        ASSERT_EQ(merged.size(), apart.size());
        for (size_t i = 0; i < apart.size(); ++i) {
          const double largest = apart[i].value.abs().max().item<double>();
          EXPECT_GT(largest, 0.0) << apart[i].name;
          EXPECT_LT((merged[i].value - apart[i].value).abs().max().item<double>(), tolerance * largest)
              << apart[i].name << ", " << per_pass << " in a pass, " << c10::toString(type) << ", dropout " << dropout;
        }
      }
    }
  }
}

TEST_F(CudaLayoutTest, OtherDataIsSeen) {
  const Trace a = Pipeline(1, 0.0, false, at::kBFloat16).Train(), b = Pipeline(1, 0.0, true, at::kBFloat16).Train();
  EXPECT_NE(FirstDifference(a, b), "");
}

}  // namespace
}  // namespace ppft::trainer
