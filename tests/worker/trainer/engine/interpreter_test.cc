// The interpreter over stages that are one multiplication each: every action is recorded, and the gradients have a closed form. Ranks are threads.
#include "worker/trainer/engine/interpreter.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/pipeline/lowering.h"
#include "common/pipeline/schedule.h"
#include "worker/trainer/comm/tcp_transport.h"
#include "worker/trainer/engine/batches.h"

namespace ppft::trainer {
namespace {

using pipeline::ScheduleKind;
using ::testing::HasSubstr;

constexpr int64_t kHidden = 3;

// Stage s multiplies by (s + 2); the first makes its input from the ids, the last sums. The loss of micro-batch m is the sum over tokens and columns of
// id * product of all factors, so the gradient of factor s is loss / factor. Small integers: sums are exact in every order.
class ScaleStage : public StageModel {
 public:
  ScaleStage(int stage, int num_stages, std::vector<std::string>* log) : stage_(stage), num_stages_(num_stages), log_(log) {
    parameters_.push_back({absl::StrCat("factor.", stage), at::full({1}, stage + 2, at::kFloat), at::full({1}, 0, at::kFloat)});
  }

  absl::StatusOr<at::Tensor> Forward(const MicrobatchInput& input, const at::Tensor& hidden_in, bool keep_for_backward, double* loss_sum) override {
    log_->push_back(absl::StrCat(stage_, "F", input.microbatch));
    if ((stage_ == 0) == hidden_in.defined()) return absl::InternalError("hidden_in");
    const at::Tensor in = stage_ == 0 ? input.ids.to(at::kFloat).unsqueeze(1).expand({-1, kHidden}).contiguous() : hidden_in;
    if (keep_for_backward) kept_[input.microbatch] = in.clone();
    const at::Tensor out = at::mul(in, factor());
    if (stage_ + 1 < num_stages_) return out;
    *loss_sum += out.sum().item<double>();
    return at::Tensor();
  }

  absl::StatusOr<at::Tensor> Backward(const MicrobatchInput& input, const at::Tensor& grad_out) override {
    log_->push_back(absl::StrCat(stage_, "B", input.microbatch));
    auto kept = kept_.find(input.microbatch);
    if (kept == kept_.end()) return absl::FailedPreconditionError("backward without forward");
    if ((stage_ + 1 == num_stages_) == grad_out.defined()) return absl::InternalError("grad_out");
    const at::Tensor grad = grad_out.defined() ? grad_out : at::full(kept->second.sizes(), input.loss_weight, at::kFloat);
    parameters_[0].gradient.add_(at::mul(grad, kept->second).sum());
    kept_.erase(kept);
    return stage_ == 0 ? at::Tensor() : at::mul(grad, factor());
  }

  absl::Status Idle(bool backward) override {
    log_->push_back(absl::StrCat(stage_, backward ? "B" : "F", " idle"));
    return absl::OkStatus();
  }

  absl::StatusOr<at::Tensor> Logits(const MicrobatchInput& input, const at::Tensor& hidden_in, const std::vector<int64_t>& rows) override {
    return at::mul(hidden_in, factor());
  }
  std::vector<Parameter>& parameters() override { return parameters_; }
  void AdapterChanged() override {}
  void ZeroGradients() override { parameters_[0].gradient.zero_(); }
  absl::Status ForEachMerged(at::ScalarType, const std::function<absl::Status(const std::string&, const at::Tensor&)>&) override { return absl::OkStatus(); }
  std::vector<model::ExpectedTensor> merged_tensors() const override { return {}; }
  int64_t activation_bytes() const override { return static_cast<int64_t>(kept_.size()); }

  float gradient() const { return parameters_[0].gradient.item<float>(); }

 private:
  double factor() const { return parameters_[0].master.item<float>(); }

  const int stage_;
  const int num_stages_;
  std::vector<std::string>* const log_;
  std::vector<Parameter> parameters_;
  std::map<int, at::Tensor> kept_;
};

// Micro-batch m has m + 1 tokens; those in `empty` have none.
std::vector<MicrobatchInput> Inputs(int count, const std::set<int>& empty) {
  std::vector<MicrobatchInput> inputs;
  for (int m = 0; m < count; ++m) {
    MicrobatchInput input;
    input.microbatch = m;
    if (empty.count(m) == 0) {
      input = ProbeInput(std::vector<int32_t>(m + 1, m + 1));
      input.microbatch = m;
    }
    inputs.push_back(input);
  }
  return inputs;
}

struct Case {
  ScheduleKind kind;
  int pp;
  int virtual_stages;
  int microbatches;
  std::set<int> empty;
};

struct Result {
  std::vector<absl::Status> statuses;
  double loss_sum = 0;
  std::vector<float> gradients;                // by stage
  std::vector<std::vector<std::string>> logs;  // by rank
  std::vector<pipeline::Program> programs;     // by rank
};

Result RunPipeline(const Case& c, int passes) {
  const pipeline::Mesh mesh{1, c.pp, c.virtual_stages};
  const auto compute = *pipeline::BuildSchedule({c.kind, c.pp, c.virtual_stages, c.microbatches});
  Result result;
  result.programs = *pipeline::Lower(compute, mesh.num_stages());
  result.statuses.resize(c.pp);
  result.logs.resize(c.pp);
  result.gradients.resize(mesh.num_stages());
  std::vector<double> losses(c.pp, 0.0);
  std::vector<TcpListener> listeners;
  std::vector<std::string> endpoints;
  for (int rank = 0; rank < c.pp; ++rank) {
    listeners.push_back(*TcpListener::Open("127.0.0.1"));
    endpoints.push_back(listeners.back().address());
  }
  std::vector<std::thread> threads;
  for (int rank = 0; rank < c.pp; ++rank) {
    threads.emplace_back([&, rank] {
      TcpOptions options;
      options.rank = rank;
      options.size = c.pp;
      options.stall_timeout = absl::Seconds(30);
      options.ring_frames = 4;  // less than a step's messages: a proven order needs no more
      std::vector<Link> links;
      for (int peer = 0; peer < c.pp; ++peer) {
        for (Channel channel : {Channel::kActivations, Channel::kGradients}) {
          if (peer != rank) links.push_back({peer, channel});
        }
      }
      auto transport = ConnectTcp(std::move(listeners[rank]), options, endpoints, links);
      if (!transport.ok()) {
        result.statuses[rank] = transport.status();
        return;
      }
      std::map<int, std::unique_ptr<ScaleStage>> stages;
      std::map<int, StageModel*> map;
      for (const int stage : mesh.StagesOf(rank)) {
        stages[stage] = std::make_unique<ScaleStage>(stage, mesh.num_stages(), &result.logs[rank]);
        map[stage] = stages[stage].get();
      }
      Activity activity(nullptr);
      Interpreter interpreter(rank, mesh, map, kHidden, at::kFloat, transport->get(), &activity);
      for (int pass = 1; pass <= passes; ++pass) {
        PassOptions pass_options;
        pass_options.pass = pass;
        pass_options.keep_for_backward = true;
        result.statuses[rank] = interpreter.Run(result.programs[rank], Inputs(c.microbatches, c.empty), pass_options, &losses[rank]);
        if (!result.statuses[rank].ok()) return;
      }
      for (const auto& [stage, model] : stages) {
        result.gradients[stage] = model->gradient();
        EXPECT_EQ(model->activation_bytes(), 0) << "an activation was never used";
      }
      result.statuses[rank] = (*transport)->Close();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double loss : losses) result.loss_sum += loss;
  return result;
}

TEST(Interpreter, AccumulationEqualsOneBatchInEverySchedule) {
  const std::vector<Case> cases = {
      {ScheduleKind::kGPipe, 1, 1, 4, {}},
      {ScheduleKind::k1F1B, 1, 1, 1, {}},
      {ScheduleKind::kInterleaved1F1B, 1, 3, 4, {}},
      {ScheduleKind::kGPipe, 2, 1, 4, {}},
      {ScheduleKind::k1F1B, 2, 1, 5, {}},
      {ScheduleKind::kInterleaved1F1B, 2, 2, 4, {}},
      {ScheduleKind::kGPipe, 4, 1, 8, {}},
      {ScheduleKind::k1F1B, 4, 1, 8, {}},
      {ScheduleKind::kInterleaved1F1B, 4, 2, 9, {}},
      {ScheduleKind::k1F1B, 3, 1, 6, {4, 5}},
      {ScheduleKind::kInterleaved1F1B, 2, 3, 6, {5}},
      {ScheduleKind::kGPipe, 2, 1, 4, {0, 1, 2, 3}},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(absl::StrCat(pipeline::ToString(c.kind), " pp ", c.pp, " virtual ", c.virtual_stages, " micro-batches ", c.microbatches));
    const int passes = 2;
    const Result result = RunPipeline(c, passes);
    for (const absl::Status& status : result.statuses) ASSERT_TRUE(status.ok()) << status;
    const int num_stages = c.pp * c.virtual_stages;
    double product = 1, base = 0;
    for (int stage = 0; stage < num_stages; ++stage) product *= stage + 2;
    for (int m = 0; m < c.microbatches; ++m) base += c.empty.count(m) != 0 ? 0 : passes * kHidden * (m + 1) * (m + 1);
    EXPECT_NEAR(result.loss_sum, base * product, 1e-6 * base * product);
    for (int stage = 0; stage < num_stages; ++stage) {
      const double expected = base * product / (stage + 2);
      EXPECT_NEAR(result.gradients[stage], expected, 1e-6 * expected) << "stage " << stage;
    }
    // Exactly the program's compute actions in its order, those of an empty micro-batch as a sign to the stage alone.
    for (int rank = 0; rank < c.pp; ++rank) {
      std::vector<std::string> expected;
      for (int pass = 0; pass < passes; ++pass) {
        for (const pipeline::Action& action : result.programs[rank]) {
          if (!pipeline::IsCompute(action.op)) continue;
          const bool empty = c.empty.count(action.microbatch) != 0;
          expected.push_back(empty ? absl::StrCat(action.stage, action.op == pipeline::Op::kForward ? "F" : "B", " idle") : ToString(action));
        }
      }
      EXPECT_EQ(result.logs[rank], expected);
    }
  }
}

absl::Status RunAlone(const std::string& program, int num_stages) {
  std::vector<std::string> log;
  std::vector<std::unique_ptr<ScaleStage>> stages;
  std::map<int, StageModel*> map;
  for (int stage = 0; stage < num_stages; ++stage) {
    stages.push_back(std::make_unique<ScaleStage>(stage, num_stages, &log));
    map[stage] = stages.back().get();
  }
  Activity activity(nullptr);
  Interpreter interpreter(0, {1, 1, num_stages}, map, kHidden, at::kFloat, nullptr, &activity);
  PassOptions options;
  options.keep_for_backward = true;
  double loss_sum = 0;
  return interpreter.Run(*pipeline::ParseProgram(program), Inputs(2, {}), options, &loss_sum);
}

TEST(Interpreter, AProgramThatUsesWhatItHasNotMadeIsRefused) {
  struct Wrong {
    const char* program;
    int num_stages;
    const char* message;
  };
  const Wrong cases[] = {
      {"1F0 0F0", 2, "1F0 without its input"},
      {"0F0 1F0 0B0", 2, "0B0 without its gradient"},
      {"0F0", 2, "leaves tensors that nothing consumes"},
      {"0F7", 1, "0F7 has a stage or micro-batch that this rank does not have"},
      {"5F0", 1, "5F0 has a stage or micro-batch that this rank does not have"},
      {"0F0 0SEND_F0", 1, "0SEND_F0 without a stage to send to"},
      {"0B0", 1, "backward without forward"},
  };
  for (const Wrong& wrong : cases) {
    const absl::Status status = RunAlone(wrong.program, wrong.num_stages);
    EXPECT_FALSE(status.ok()) << wrong.program;
    EXPECT_THAT(std::string(status.message()), HasSubstr(wrong.message));
  }
  EXPECT_TRUE(RunAlone("0F0 1F0 1B0 0B0", 2).ok());
}

}  // namespace
}  // namespace ppft::trainer
