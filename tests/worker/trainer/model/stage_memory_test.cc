// What saves memory changes no number: activation checkpointing, and layers and gradients shared out over replicas (here threads).
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <limits>
#include <map>
#include <mutex>
#include <thread>

#include "common/model/memory.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {
namespace {

model::ModelConfig Config() {
  model::ModelConfig config;
  config.hidden_size = 24;
  config.intermediate_size = 40;
  config.num_layers = 5;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 2;
  config.head_dim = 4;
  config.vocab_size = 31;
  config.max_position_embeddings = 64;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 100;
  config.tie_word_embeddings = true;
  return config;
}

TensorSource RandomSource(const model::ModelConfig& config) {
  at::manual_seed(3);
  auto tensors = std::make_shared<std::map<std::string, at::Tensor>>();
  for (const model::ExpectedTensor& t : model::ExpectedTensors(config)) (*tensors)[t.name] = at::randn(t.shape) * 0.3;
  return [tensors](const std::string& name) -> absl::StatusOr<at::Tensor> {
    const auto it = tensors->find(name);
    if (it == tensors->end()) return absl::NotFoundError(name);
    return it->second;
  };
}

StageOptions Whole(at::ScalarType compute) {
  StageOptions options;
  options.num_layers = 5;
  options.has_embedding = options.has_head = true;
  options.compute = compute;
  options.lora = {3, 1.5, 0.25, 11, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}};
  return options;
}

MicrobatchInput Input(int microbatch) {
  at::manual_seed(100 + microbatch);
  MicrobatchInput input;
  input.step = 4;
  input.microbatch = microbatch;
  input.cu_seqlens = {0, 3, 6, 7, 11 + microbatch};
  input.ids = at::randint(31, {11 + microbatch}, at::kLong);
  input.target_rows = at::tensor({1, 3, 4, 7, 8, 9}, at::kLong);
  input.target_ids = at::randint(31, {6}, at::kLong);
  input.loss_weight = 0.125;
  return input;
}

std::unique_ptr<StageModel> Make(const StageOptions& options) {
  static const TensorSource* const source = new TensorSource(RandomSource(Config()));
  auto stage = StageModel::Create(Config(), options, *source);
  EXPECT_TRUE(stage.ok()) << stage.status();
  at::manual_seed(8);
  for (const Parameter& p : (*stage)->parameters()) p.master.copy_(at::randn(p.master.sizes()) * 0.2);
  (*stage)->AdapterChanged();
  return *std::move(stage);
}

// Loss, and all gradients in one row.
struct Result {
  double loss = 0;
  at::Tensor gradients;
};

Result Train(StageModel& stage, const std::vector<int>& microbatches) {
  Result result;
  stage.ZeroGradients();
  for (const int m : microbatches) EXPECT_TRUE(stage.Forward(Input(m), at::Tensor(), true, &result.loss).ok());
  for (const int m : microbatches) {
    const auto done = stage.Backward(Input(m), at::Tensor());
    EXPECT_TRUE(done.ok()) << done.status();
  }
  if (stage.gradient_shard().defined()) {
    result.gradients = stage.gradient_shard().clone();
    return result;
  }
  result.gradients = stage.flat_parameters().gradient.clone();
  return result;
}

TEST(Checkpointing, RecomputesTheSameBitsInLessMemory) {
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16, at::kHalf}) {
    std::map<model::ActivationCheckpointing, int64_t> kept;
    Result none;
    for (const model::ActivationCheckpointing mode :
         {model::ActivationCheckpointing::kNone, model::ActivationCheckpointing::kSelective, model::ActivationCheckpointing::kFull}) {
      StageOptions options = Whole(compute);
      options.checkpointing = mode;
      const auto stage = Make(options);
      const Result result = Train(*stage, {0, 1, 2});
      if (mode == model::ActivationCheckpointing::kNone) none = result;
      EXPECT_EQ(result.loss, none.loss);
      EXPECT_TRUE(at::equal(result.gradients, none.gradients)) << static_cast<int>(mode);
      double loss = 0;
      ASSERT_TRUE(stage->Forward(Input(0), at::Tensor(), true, &loss).ok());
      kept[mode] = stage->activation_bytes();
    }
    EXPECT_GT(none.gradients.abs().max().item<double>(), 0);
    EXPECT_LT(kept[model::ActivationCheckpointing::kSelective], 0.75 * kept[model::ActivationCheckpointing::kNone]);
    EXPECT_LT(kept[model::ActivationCheckpointing::kFull], 0.2 * kept[model::ActivationCheckpointing::kNone]);
  }
}

TEST(EndSteps, LeavesNothingOfTheStepsAndTheSameLogits) {
  for (const model::ActivationCheckpointing mode : {model::ActivationCheckpointing::kNone, model::ActivationCheckpointing::kFull}) {
    StageOptions options = Whole(at::kFloat);
    options.checkpointing = mode;
    options.least_tokens = 50;
    const auto stage = Make(options);
    Train(*stage, {0, 1});
    MicrobatchInput probe = Input(0);
    probe.training = false;
    const auto before = stage->Logits(probe, at::Tensor(), {0, 10});
    ASSERT_TRUE(before.ok()) << before.status();
    const HeldBytes steps = stage->held_bytes();
    stage->EndSteps();
    EXPECT_EQ(stage->held_bytes().activations + stage->held_bytes().scratch, 0);
    EXPECT_EQ(stage->held_bytes().weights + stage->held_bytes().masters, steps.weights + steps.masters);
    const auto after = stage->Logits(probe, at::Tensor(), {0, 10});
    ASSERT_TRUE(after.ok()) << after.status();
    EXPECT_TRUE(at::equal(*before, *after));
    EXPECT_LT(stage->held_bytes().scratch, steps.scratch / 2);  // eleven tokens, not fifty
    EXPECT_LT(stage->held_bytes().activations, steps.activations / 2);
  }
}

// The planner's accounting is what a stage holds, to the byte.
model::StageMemory Predicted(const StageOptions& options, int64_t tokens, int64_t targets, bool evaluates) {
  model::StageMemoryOptions memory;
  memory.compute_bytes = static_cast<int64_t>(at::elementSize(options.compute));
  memory.tokens = tokens;
  memory.targets = targets;
  memory.head_rows = options.head_chunk_rows;
  memory.dropout = options.lora.dropout > 0;
  memory.evaluates = evaluates;
  memory.checkpointing = options.checkpointing;
  memory.zero_stage = options.weights == WeightHome::kSharded ? 3 : 0;
  memory.replicas = options.num_replicas;
  return model::MemoryOfStage(Config(), {options.lora.r, options.lora.target_modules}, {options.num_layers, options.has_embedding, options.has_head}, memory);
}

TEST(Accounting, EqualsWhatAStageHolds) {
  struct Ends {
    int first_layer, num_layers;
    bool embedding, head;
  };
  const std::vector<std::vector<std::string>> targets = {Whole(at::kFloat).lora.target_modules, {"q_proj", "v_proj"}, {"down_proj"}};
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16}) {
    for (const model::ActivationCheckpointing mode :
         {model::ActivationCheckpointing::kNone, model::ActivationCheckpointing::kSelective, model::ActivationCheckpointing::kFull}) {
      for (const Ends& ends : {Ends{0, 5, true, true}, Ends{0, 2, true, false}, Ends{2, 2, false, false}, Ends{4, 1, false, true}}) {
        for (const auto& modules : targets) {
          StageOptions options = Whole(compute);
          options.checkpointing = mode;
          options.first_layer = ends.first_layer;
          options.num_layers = ends.num_layers;
          options.has_embedding = ends.embedding;
          options.has_head = ends.head;
          options.lora.target_modules = modules;
          options.lora.dropout = modules.size() == 2 ? 0 : 0.25;
          options.head_chunk_rows = 4;
          const auto stage = Make(options);
          const int64_t tokens = 13, rows = 6;
          const at::Tensor hidden = at::randn({tokens, 24}).to(compute);
          const at::Tensor none;
          MicrobatchInput inputs[2] = {Input(2), Input(2)};
          inputs[1].microbatch = 3;
          double loss = 0;
          for (const MicrobatchInput& input : inputs) ASSERT_TRUE(stage->Forward(input, ends.embedding ? none : hidden, true, &loss).ok());
          const int64_t in_flight = stage->activation_bytes();
          for (const MicrobatchInput& input : inputs) ASSERT_TRUE(stage->Backward(input, ends.head ? none : hidden).ok());
          const model::StageMemory predicted = Predicted(options, tokens, rows, /*evaluates=*/false);
          const HeldBytes held = stage->held_bytes();
          EXPECT_EQ(held.weights, predicted.weights);
          EXPECT_EQ(held.masters, predicted.masters);
          EXPECT_EQ(held.gradients, predicted.gradients);
          EXPECT_EQ(in_flight, 2 * predicted.kept);
          EXPECT_EQ(held.activations, 2 * predicted.kept + predicted.transient);
          EXPECT_EQ(held.scratch, predicted.scratch) << static_cast<int>(mode) << " " << ends.first_layer << " " << modules.size();
          // A pass without a backward takes one layer's room and no more.
          ASSERT_TRUE(stage->Forward(inputs[0], ends.embedding ? none : hidden, false, &loss).ok());
          const model::StageMemory evaluated = Predicted(options, tokens, rows, /*evaluates=*/true);
          EXPECT_EQ(stage->held_bytes().activations, 2 * evaluated.kept + evaluated.transient);
        }
      }
    }
  }
}

TEST(Weights, AStageThatStreamsItsLayersGivesTheSameBits) {
  const Result resident = Train(*Make(Whole(at::kFloat)), {0, 1});
  StageOptions options = Whole(at::kFloat);
  options.weights = WeightHome::kStreamed;
  const auto stage = Make(options);
  const Result streamed = Train(*stage, {0, 1});
  EXPECT_EQ(streamed.loss, resident.loss);
  EXPECT_TRUE(at::equal(streamed.gradients, resident.gradients));
}

// What the replicas hand to each other, by the number of the operation. Fails an operation whose sizes differ between the replicas.
class Board {
 public:
  explicit Board(size_t replicas) : replicas_(replicas) {}

  void Put(const std::string& operation, size_t replica, const at::Tensor& tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    posts_[operation][replica] = tensor.clone();
    changed_.notify_all();
  }
  std::map<size_t, at::Tensor> TakeAll(const std::string& operation) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return posts_[operation].size() == replicas_; });
    return posts_[operation];
  }

 private:
  const size_t replicas_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::map<size_t, at::Tensor>> posts_;  // guarded by mutex_
};

class BoardExchange final : public ReplicaExchange {
 public:
  BoardExchange(Board* board, int size, int index) : board_(board), size_(size), index_(index) {}

  int size() const override { return size_; }
  int index() const override { return index_; }
  absl::Status BeginGather(const at::Tensor& part, const at::Tensor& whole) override {
    if (gathering_) return absl::InternalError("two gatherings at once");
    gathering_ = true;
    whole_ = whole;
    whole_.fill_(std::numeric_limits<double>::quiet_NaN());  // whoever reads before the end notices
    board_->Put("gather " + std::to_string(++gathers_), static_cast<size_t>(index_), part);
    return absl::OkStatus();
  }
  absl::Status EndGather() override {
    if (!gathering_) return absl::InternalError("nothing to end");
    gathering_ = false;
    for (const auto& [replica, part] : board_->TakeAll("gather " + std::to_string(gathers_))) {
      whole_.narrow(0, static_cast<int64_t>(replica) * part.numel(), part.numel()).copy_(part);
    }
    return absl::OkStatus();
  }
  absl::Status BeginSum(const at::Tensor& values, const std::vector<int64_t>& bounds, const at::Tensor& sum) override {
    if (summing_) return absl::InternalError("two sums at once");
    summing_ = true;
    bounds_ = bounds;
    sum_ = sum;
    board_->Put("sum " + std::to_string(++sums_), static_cast<size_t>(index_), values);
    return absl::OkStatus();
  }
  absl::Status EndSum() override {
    if (!summing_) return absl::InternalError("nothing to end");
    summing_ = false;
    const auto me = static_cast<size_t>(index_);
    for (const auto& [replica, values] : board_->TakeAll("sum " + std::to_string(sums_))) {
      sum_.add_(values.narrow(0, bounds_[me], bounds_[me + 1] - bounds_[me]));
    }
    return absl::OkStatus();
  }
  int gathers() const { return gathers_; }

 private:
  Board* const board_;
  const int size_;
  const int index_;
  bool gathering_ = false, summing_ = false;
  int gathers_ = 0, sums_ = 0;
  at::Tensor whole_, sum_;
  std::vector<int64_t> bounds_;
};

struct Replicas {
  std::vector<Result> results;
  std::vector<HeldBytes> held;
  std::vector<int> gathers;
};

// Replica i works on microbatches[i]; a replica with fewer than the others takes part without tokens.
Replicas TrainReplicas(const StageOptions& base, bool shard_gradients, const std::vector<std::vector<int>>& microbatches) {
  const int n = static_cast<int>(microbatches.size());
  size_t rounds = 0;
  for (const auto& mine : microbatches) rounds = std::max(rounds, mine.size());
  Board board(microbatches.size());
  Replicas all;
  all.results.resize(microbatches.size());
  all.held.resize(microbatches.size());
  all.gathers.resize(microbatches.size());
  std::vector<std::unique_ptr<StageModel>> stages;
  for (int i = 0; i < n; ++i) {
    StageOptions options = base;
    options.num_replicas = n;
    options.replica = i;
    stages.push_back(Make(options));
  }
  // The threads would disturb each other's random numbers.
  std::vector<std::vector<MicrobatchInput>> all_inputs(microbatches.size());
  for (size_t i = 0; i < microbatches.size(); ++i) {
    for (const int m : microbatches[i]) all_inputs[i].push_back(Input(m));
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < n; ++i) {
    threads.emplace_back([&, i] {
      const auto me = static_cast<size_t>(i);
      BoardExchange exchange(&board, n, i);
      StageModel& stage = *stages[me];
      stage.Attach(&exchange);
      if (shard_gradients) {
        int64_t size = 0;
        for (const Parameter& p : stage.parameters()) size += p.master.numel();
        std::vector<int64_t> bounds;
        for (int k = 0; k <= n; ++k) bounds.push_back(size * k / n);
        EXPECT_TRUE(stage.ShardGradients(&exchange, bounds).ok());
      }
      const std::vector<MicrobatchInput>& inputs = all_inputs[me];
      Result& result = all.results[me];
      for (size_t round = 0; round < rounds; ++round) {
        if (round < inputs.size()) {
          const auto out = stage.Forward(inputs[round], at::Tensor(), true, &result.loss);
          EXPECT_TRUE(out.ok()) << out.status();
        } else {
          EXPECT_TRUE(stage.Idle(false).ok());
        }
        if (round < inputs.size()) {
          const auto out = stage.Backward(inputs[round], at::Tensor());
          EXPECT_TRUE(out.ok()) << out.status();
        } else {
          EXPECT_TRUE(stage.Idle(true).ok());
        }
      }
      if (shard_gradients) result.gradients = stage.gradient_shard();
      all.held[me] = stage.held_bytes();
      all.gathers[me] = exchange.gathers();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return all;
}

TEST(Replicas, LayersAndGradientsThatAreSharedOutGiveTheSameSums) {
  const HeldBytes whole = Make(Whole(at::kFloat))->held_bytes();
  for (const auto& microbatches : std::vector<std::vector<std::vector<int>>>{{{0, 1}, {2, 3}}, {{0, 1}, {2}}, {{0}, {1}, {}}}) {
    std::vector<int> every;
    for (const auto& mine : microbatches) every.insert(every.end(), mine.begin(), mine.end());
    const Result expected = Train(*Make(Whole(at::kFloat)), every);
    StageOptions options = Whole(at::kFloat);
    options.weights = WeightHome::kSharded;
    const Replicas all = TrainReplicas(options, true, microbatches);
    double loss = 0;
    std::vector<at::Tensor> parts;
    for (const Result& result : all.results) {
      loss += result.loss;
      parts.push_back(result.gradients);
    }
    EXPECT_NEAR(loss, expected.loss, 1e-6 * expected.loss);
    EXPECT_LT((at::cat(parts) - expected.gradients).abs().max().item<double>(), 1e-5 * expected.gradients.abs().max().item<double>());
    for (const HeldBytes& held : all.held) {
      EXPECT_LT(held.weights, whole.weights);
      EXPECT_LT(held.gradients, whole.gradients);
      EXPECT_EQ(held.masters, whole.masters);
    }
  }
}

TEST(Replicas, ALayerThatIsStillThereIsNotGatheredAgain) {
  StageOptions options = Whole(at::kFloat);
  options.weights = WeightHome::kSharded;
  const Replicas all = TrainReplicas(options, false, {{0, 1}, {2, 3}});
  // Five layers down; up again without the last two, which are still there; down again without the first two, which are still there; and up.
  EXPECT_THAT(all.gathers, testing::ElementsAre(5 + 3 + 3 + 3, 5 + 3 + 3 + 3));
}

TEST(Replicas, HalfOfTheLayersAndTwoBuffersIsWhatIsHeld) {
  StageOptions options = Whole(at::kHalf);
  const HeldBytes resident = Make(options)->held_bytes();
  options.weights = WeightHome::kSharded;
  options.num_replicas = 2;
  const HeldBytes sharded = Make(options)->held_bytes();
  // Per layer: the seven matrices with three columns per adapted module (block-diagonal: all of a stack).
  const int64_t layer = 40 * (24 + 9) + 24 * (24 + 3) + 80 * (24 + 6) + 24 * (40 + 3);
  const int64_t part = 2704;  // half of that, up to a multiple of 8
  EXPECT_EQ(layer, 5400);
  EXPECT_EQ(resident.weights - sharded.weights, 2 * (5 * layer - (5 * part + 2 * 2 * part)));
  EXPECT_EQ(sharded.weights, Predicted(options, 13, 6, false).weights);
}

}  // namespace
}  // namespace ppft::trainer
