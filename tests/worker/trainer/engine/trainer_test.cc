// A Trainer in this process over stages that do as they are told: what it does around them.
#include "worker/trainer/engine/trainer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/model/inventory.h"
#include "common/pipeline/lowering.h"
#include "common/pipeline/schedule.h"
#include "tests/common/data/token_file_bytes.h"
#include "worker/trainer/comm/collectives.h"
#include "worker/trainer/engine/failure.h"

namespace ppft::trainer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr char kConfig[] = R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
  "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"})";

// What the stages of a test have done, and are to do.
struct StageLog {
  std::set<int64_t> overflows;                // steps whose gradients are infinite
  std::vector<WeightHome> made;               // of each stage, in order
  std::vector<HeldBytes> held;                // once made
  std::vector<int> alive_when_made;           // others
  std::vector<int64_t> buffers_when_merging;  // bytes of activations and scratch
  int alive = 0;
};

class ToldStage final : public StageModel {
 public:
  ToldStage(std::unique_ptr<StageModel> stage, StageLog* log) : stage_(std::move(stage)), log_(log) { ++log_->alive; }
  ~ToldStage() override { --log_->alive; }

  absl::StatusOr<at::Tensor> Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep, double* loss_sum) override {
    return stage_->Forward(input, hidden_in, keep, loss_sum);
  }
  absl::StatusOr<at::Tensor> Backward(const MicrobatchInput& input, const at::Tensor& grad_out) override {
    absl::StatusOr<at::Tensor> result = stage_->Backward(input, grad_out);
    if (log_->overflows.count(input.step) != 0) stage_->parameters()[0].gradient.fill_(std::numeric_limits<float>::infinity());
    return result;
  }
  absl::StatusOr<at::Tensor> Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) override {
    return stage_->Logits(input, hidden_in, rows);
  }
  at::Tensor loss_total() override { return stage_->loss_total(); }
  std::vector<Parameter>& parameters() override { return stage_->parameters(); }
  void AdapterChanged() override { stage_->AdapterChanged(); }
  void ZeroGradients() override { stage_->ZeroGradients(); }
  FlatParameters flat_parameters() override { return stage_->flat_parameters(); }
  absl::Status ForEachMerged(at::ScalarType dtype, const std::function<absl::Status(const std::string&, const at::Tensor&)>& visit) override {
    const HeldBytes held = stage_->held_bytes();
    log_->buffers_when_merging.push_back(held.activations + held.scratch);
    return stage_->ForEachMerged(dtype, visit);
  }
  std::vector<model::ExpectedTensor> merged_tensors() const override { return stage_->merged_tensors(); }
  int64_t activation_bytes() const override { return stage_->activation_bytes(); }
  void EndSteps() override { stage_->EndSteps(); }
  HeldBytes held_bytes() const override { return stage_->held_bytes(); }

 private:
  const std::unique_ptr<StageModel> stage_;
  StageLog* const log_;
};

StageFactory FactoryOf(StageLog* log) {
  return [log](const model::ModelConfig& config, const StageOptions& options, const TensorSource& source) -> absl::StatusOr<std::unique_ptr<StageModel>> {
    absl::StatusOr<std::unique_ptr<StageModel>> stage = StageModel::Create(config, options, source);
    if (!stage.ok()) return stage;
    log->made.push_back(options.weights);
    log->held.push_back((*stage)->held_bytes());
    log->alive_when_made.push_back(log->alive);
    return std::make_unique<ToldStage>(*std::move(stage), log);
  };
}

class RecordingReporter final : public Reporter {
 public:
  void Listening(const std::string&) override {}
  void Ready() override {}
  void Step(const StepReport& report) override { steps.push_back(report); }
  void Eval(const EvalReport&) override {}
  void Checkpoint(const CheckpointWritten& report) override { checkpoints.push_back(report); }
  void Stats(const StageStats&) override {}
  void Finished(const TrainingState&, const std::string&) override { order.push_back("finished"); }
  void Exported(const ExportWritten& report) override {
    order.push_back("exported");
    exports.push_back(report);
  }
  void Trace(const RankTrace&) override {}
  void Log(Severity, const std::string& text) override {
    if (text.find("memory: ") != std::string::npos) order.push_back("memory");
  }
  void Failed(const FailureReport&) override {}

  std::vector<double> rates() const {
    std::vector<double> rates;
    for (const StepReport& step : steps) rates.push_back(step.row.learning_rate.value_or(-1));
    return rates;
  }

  std::vector<StepReport> steps;
  std::vector<CheckpointWritten> checkpoints;
  std::vector<ExportWritten> exports;
  std::vector<std::string> order;
};

class TrainerTest : public testing::Test {
 protected:
  void SetUp() override {
    const testing::TestInfo& test = *testing::UnitTest::GetInstance()->current_test_info();
    folder_ = JoinPath(testing::TempDir(), absl::StrCat("trainer_test_", test.name()));
    ASSERT_TRUE(RemoveAll(folder_).ok());
    ASSERT_TRUE(MakeDirs(folder_).ok());
    const auto parsed = model::ParseModelConfig(kConfig, "config.json");
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    at::manual_seed(3);
    for (const model::ExpectedTensor& tensor : model::ExpectedTensors(*parsed)) {
      const at::Tensor values = (at::randn(tensor.shape) * 0.3).contiguous();
      const std::string path = JoinPath(folder_, tensor.name);
      ASSERT_TRUE(WriteFileAtomic(path, absl::string_view(static_cast<const char*>(values.data_ptr()), values.nbytes())).ok());
      tensors_.push_back({tensor.name, "F32", tensor.shape, path});
    }
    std::vector<uint32_t> ids;
    std::vector<int64_t> offsets = {0}, rows;
    for (int row = 1; row <= 8; ++row) {
      for (int t = 0; t < 12; ++t) ids.push_back(static_cast<uint32_t>(3 + (row * 7 + t * 5) % 30));
      offsets.push_back(static_cast<int64_t>(ids.size()));
      rows.push_back(row);
    }
    const std::vector<uint8_t> supervised(ids.size(), 1);
    ASSERT_TRUE(WriteFileAtomic(JoinPath(folder_, "train.safetensors"), data::TokenFileBytes({ids, supervised, offsets, rows}, {})).ok());
  }

  // `replicas` of the whole model, one step per two rows and replica.
  TrainerConfig Config(int64_t steps, int replicas = 1) const {
    TrainerConfig config;
    config.job_id = "job-test0001";
    config.epoch = 1;
    config.model_config = kConfig;
    config.tensors = tensors_;
    config.directory = folder_;
    config.plan.data_parallel_size = replicas;
    config.plan.num_microbatches = 2;
    config.plan.total_steps = steps;
    config.plan.microbatch_tokens = 16;
    config.plan.stages = {{0, 0, 6, true, true}};
    const auto schedule = pipeline::BuildSchedule({pipeline::ScheduleKind::k1F1B, 1, 1, 2});
    const std::string program = pipeline::FormatProgram((*pipeline::Lower(*schedule, 1))[0]);
    for (int rank = 0; rank < replicas; ++rank) config.plan.ranks.push_back({rank, rank, 0, {0}, program, "cpu:0"});
    config.adapter = {4, 2.0, 0.0, {"q_proj", "v_proj", "down_proj"}};
    config.data = {16, 1, /*sample_packing=*/false, /*shuffle=*/false};
    config.train_tokens = {JoinPath(folder_, "train.safetensors"), "train.safetensors", "data", 0};
    config.schedule = {"linear", 1e-3, /*warmup_steps=*/4, /*total_steps=*/steps};
    config.stall_timeout = absl::Seconds(60);
    return config;
  }

  // One rank, to its end.
  absl::Status Run(const TrainerConfig& config, StageLog* log, RecordingReporter* reporter) {
    Trainer trainer(config, reporter, nullptr, nullptr, FactoryOf(log));
    if (const absl::Status status = trainer.Load(); !status.ok()) return status;
    absl::StatusOr<TcpListener> listener = TcpListener::Open("127.0.0.1");
    if (!listener.ok()) return listener.status();
    const std::string address = listener->address();
    if (const absl::Status status = trainer.Connect(*std::move(listener), {address}); !status.ok()) return status;
    return trainer.Run();
  }

  std::string folder_;
  std::vector<BaseTensor> tensors_;
};

TEST_F(TrainerTest, AVerificationHoldsOneLayerOfTheMergedModelAndNothingOfTheTrainedOne) {
  TrainerConfig config = Config(2);
  config.write_merged = true;
  StageLog log;
  RecordingReporter reporter;
  const absl::Status status = Run(config, &log, &reporter);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_THAT(reporter.exports, SizeIs(1));
  ASSERT_THAT(reporter.exports[0].verifications, SizeIs(2));
  EXPECT_THAT(log.made, ElementsAre(WeightHome::kResident, WeightHome::kStreamed));
  EXPECT_THAT(log.alive_when_made, ElementsAre(0, 0));
  ASSERT_THAT(log.held, SizeIs(2));
  // Two tables of 37 by 16, one of six layers of 16 (4 * 16 + 3 * 24), the norms.
  EXPECT_EQ(log.held[1].weights, 4 * (2 * 37 * 16 + 16 * (4 * 16 + 3 * 24) + 13 * 16));
  EXPECT_LT(log.held[1].weights, log.held[0].weights / 2);
  EXPECT_EQ(log.held[1].masters + log.held[1].gradients, 0);
  EXPECT_EQ(log.alive, 0);
  EXPECT_THAT(log.buffers_when_merging, ElementsAre(0)) << "the steps' buffers are gone before matrices are merged";
  // What it took at the most is told when all is done, before the worker takes the files away.
  EXPECT_THAT(reporter.order, ElementsAre("finished", "memory", "exported"));
}

TEST_F(TrainerTest, TheScheduleStandsStillWhereAnOverflowIsSkipped) {
  TrainerConfig config = Config(10);
  config.loss_scaler.active = true;
  config.loss_scaler.initial_scale_power = 8;
  config.verify = false;
  config.save_steps = 4;
  StageLog calm, log;
  RecordingReporter undisturbed, reporter;
  ASSERT_TRUE(Run(config, &calm, &undisturbed).ok());
  log.overflows = {2, 4, 7};  // two of them in the warm-up
  ASSERT_TRUE(Run(config, &log, &reporter).ok());

  ASSERT_THAT(reporter.steps, SizeIs(10));
  const std::vector<double> rates = undisturbed.rates();
  for (int64_t step = 1; step <= 10; ++step) EXPECT_EQ(rates[static_cast<size_t>(step - 1)], LearningRate(config.schedule, step));
  const std::vector<double> expected = {rates[0], rates[1], rates[1], rates[2], rates[2], rates[3], rates[4], rates[4], rates[5], rates[6]};
  EXPECT_EQ(reporter.rates(), expected);
  for (size_t i = 0; i < 10; ++i) EXPECT_EQ(reporter.steps[i].row.skipped, log.overflows.count(static_cast<int64_t>(i) + 1) != 0);

  // Goes on at the same rates from a checkpoint.
  ASSERT_EQ(reporter.checkpoints[0].state.step, 4);
  ASSERT_EQ(reporter.checkpoints[0].state.skipped_steps, 2);
  config.resume = reporter.checkpoints[0].state;
  config.resume_files = reporter.checkpoints[0].files;
  RecordingReporter resumed;
  const absl::Status status = Run(config, &log, &resumed);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(resumed.rates(), std::vector<double>(expected.begin() + 4, expected.end()));
}

// The other replica, as the steps of a trainer appear to its peers: infinite sums, then the meeting in which all learn that no smaller scale is left. It comes
// late to that; a rank that had not waited would have taken its links down.
TEST_F(TrainerTest, NoRankGoesBeforeAllKnowThatTheScaleIsExhausted) {
  TrainerConfig config = Config(4, /*replicas=*/2);
  config.loss_scaler.active = true;
  config.loss_scaler.initial_scale_power = 0;
  config.loss_scaler.hysteresis = 1;
  std::vector<TcpListener> listeners;
  std::vector<std::string> endpoints;
  for (int rank = 0; rank < 2; ++rank) {
    listeners.push_back(*TcpListener::Open("127.0.0.1"));
    endpoints.push_back(listeners.back().address());
  }
  StageLog log;
  log.overflows = {1};
  RecordingReporter reporter;
  absl::Status failed;
  std::thread rank0([&] {
    Trainer trainer(config, &reporter, nullptr, nullptr, FactoryOf(&log));
    failed = trainer.Load();
    if (failed.ok()) failed = trainer.Connect(std::move(listeners[0]), endpoints);
    if (failed.ok()) failed = trainer.Run();
    trainer.Abort(failed);
  });

  TcpOptions options;
  options.job_id = config.job_id;
  options.epoch = config.epoch;
  options.rank = 1;
  options.size = 2;
  options.stall_timeout = config.stall_timeout;
  auto transport = ConnectTcp(std::move(listeners[1]), options, endpoints, {{0, Channel::kControl}});
  absl::Status met = transport.status();
  if (met.ok()) {
    Group world(transport->get(), 0, {0, 1}), replicas(transport->get(), 1, {0, 1});
    const auto gather = [&](const std::vector<double>& values) {
      const auto count = static_cast<int64_t>(values.size());
      return world.AllGather(values, {count, count}).status();
    };
    const int64_t per_layer = 4 * (16 + 16 + 24 + 16 + 16 + 16);  // q, v and down: r (in + out)
    std::vector<float> gradients(static_cast<size_t>(6 * per_layer), 0.0f);
    met = gather({0});  // trace orders
    if (met.ok()) met = replicas.AllReduceSum(absl::MakeSpan(gradients));
    std::vector<double> sums(2 + 6 * 6, 0.0);
    if (met.ok()) met = gather(sums);
    if (met.ok()) met = gather({0});
  }
  rank0.join();
  EXPECT_TRUE(met.ok()) << met;
  const FailureReport report = DescribeFailure(failed, 1);
  EXPECT_EQ(report.code, "NUMERIC_DIVERGENCE") << failed;
  EXPECT_THAT(report.message, HasSubstr("is not finite in step 1"));
  EXPECT_THAT(report.message, HasSubstr("the loss scale cannot go below 1"));
}

}  // namespace
}  // namespace ppft::trainer
