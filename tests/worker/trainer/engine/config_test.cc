#include "worker/trainer/engine/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "worker/trainer/comm/transport.h"
#include "worker/trainer/engine/failure.h"

namespace ppft::trainer {
namespace {

using ::testing::HasSubstr;

TrainerConfig TwoStages() {
  TrainerConfig config;
  config.plan.pipeline_parallel_size = 2;
  config.plan.total_steps = 10;
  config.plan.stages = {{0, 0, 3, true, false}, {1, 3, 2, false, true}};
  config.plan.ranks = {{0, 0, 0, {0}, ""}, {1, 0, 1, {1}, ""}};
  return config;
}

TEST(CheckConfig, APlanThatContradictsItselfIsRefused) {
  EXPECT_TRUE(CheckConfig(TwoStages()).ok());
  struct Wrong {
    std::function<void(TrainerConfig&)> change;
    const char* message;
  };
  const Wrong cases[] = {
      {[](TrainerConfig& c) { c.plan.virtual_stages = 0; }, "a size below 1"},
      {[](TrainerConfig& c) { c.plan.ranks.pop_back(); }, "lists 1 ranks where its mesh has 2"},
      {[](TrainerConfig& c) { c.plan.stages.pop_back(); }, "lists 1 stages"},
      {[](TrainerConfig& c) { c.rank = 2; }, "rank 2 is not in a plan of 2"},
      {[](TrainerConfig& c) { c.plan.ranks[1].pipeline_rank = 0; }, "rank 1 of the plan is not in its place"},
      {[](TrainerConfig& c) { c.plan.ranks[0].stages = {1}; }, "rank 0 holds a stage that belongs to another rank"},
      {[](TrainerConfig& c) { c.plan.stages[1].first_layer = 4; }, "stage 1 of the plan is not in its place"},
      {[](TrainerConfig& c) { c.plan.stages[1].has_head = false; }, "stage 1 of the plan is not in its place"},
      {[](TrainerConfig& c) { c.plan.total_steps = 0; }, "no optimizer step"},
      {[](TrainerConfig& c) { c.plan.microbatches_per_pass = 0; }, "merges 0 of 1 micro-batches"},
      {[](TrainerConfig& c) { c.plan.microbatches_per_pass = 2; }, "merges 2 of 1 micro-batches"},
      {[](TrainerConfig& c) { c.plan.zero_stage = 4; }, "zero_stage 4 is unknown"},
      {[](TrainerConfig& c) { c.schedule.name = "step"; }, "lr_scheduler \"step\" is unknown"},
  };
  for (const Wrong& wrong : cases) {
    TrainerConfig config = TwoStages();
    wrong.change(config);
    const absl::Status status = CheckConfig(config);
    EXPECT_TRUE(absl::IsInvalidArgument(status));
    EXPECT_THAT(std::string(status.message()), HasSubstr(wrong.message));
  }
}

TEST(CheckPasses, AProgramLeavesOutNoMicrobatch) {
  PlanSpec plan;
  plan.num_microbatches = 8;
  plan.microbatches_per_pass = 3;
  plan.microbatch_tokens = 100;
  EXPECT_EQ(plan.num_passes(), 3);
  EXPECT_EQ(plan.pass_tokens(), 300);
  EXPECT_TRUE(CheckPasses(*pipeline::ParseProgram("0F0 0B0 0F1 0B1 0F2 0B2"), plan).ok());
  EXPECT_THAT(std::string(CheckPasses(*pipeline::ParseProgram("0F0 0B0 0F1 0B1"), plan).message()), HasSubstr("2 passes where its micro-batches make 3"));
  plan.microbatches_per_pass = 1;  // a trainer that was told nothing of merging
  EXPECT_FALSE(CheckPasses(*pipeline::ParseProgram("0F0 0B0"), plan).ok());
}

TEST(DescribeFailure, TheFirstReasonStaysAndOthersComeFromTheStatus) {
  absl::Status status = WithReason(absl::DataLossError("bits"), "CHECKPOINT_CORRUPT", "INFRASTRUCTURE", "start again");
  status = WithReason(status, "MODEL_INVALID", "USER", "other");
  FailureReport report = DescribeFailure(status, 7);
  EXPECT_EQ(report.code, "CHECKPOINT_CORRUPT");
  EXPECT_EQ(report.owner, "INFRASTRUCTURE");
  EXPECT_EQ(report.remedy, "start again");
  EXPECT_EQ(report.message, "bits");
  EXPECT_EQ(report.step, 7);
  EXPECT_EQ(report.peer, -1);
  report = DescribeFailure(WithPeer(absl::UnavailableError("gone"), 3), 0);
  EXPECT_EQ(report.code, "COMM_ERROR");
  EXPECT_EQ(report.peer, 3);
  EXPECT_EQ(DescribeFailure(absl::ResourceExhaustedError("memory"), 0).code, "OUT_OF_DEVICE_MEMORY");
  EXPECT_TRUE(WithReason(absl::OkStatus(), "X", "Y", "Z").ok());
}

}  // namespace
}  // namespace ppft::trainer
