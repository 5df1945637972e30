#include "coordinator/core/progress.h"

#include <gtest/gtest.h>

namespace ppft::coordinator {
namespace {

TEST(Progress, AStepReportFillsTheStatus) {
  v1::JobStatus status;
  status.set_total_steps(100);
  status.set_step(10);
  v1::StepReport report;
  report.mutable_row()->set_step(20);
  report.mutable_row()->set_loss(2.5);
  report.set_tokens_seen(4000);
  report.set_seconds(5);
  ApplyStep(status, report);
  EXPECT_EQ(status.step(), 20);
  EXPECT_EQ(status.loss(), 2.5);
  EXPECT_EQ(status.tokens_seen(), 4000);
  EXPECT_EQ(status.eta().seconds(), 40) << "half a second a step, 80 steps left";
}

TEST(Progress, TheFirstEvaluationIsKept) {
  v1::JobStatus status;
  for (const double loss : {3.0, 2.0}) {
    v1::EvalReport report;
    report.mutable_row()->set_eval_loss(loss);
    report.set_best_metric(loss);
    report.set_best_step(static_cast<int64_t>(10 / loss));
    ApplyEval(status, report);
  }
  EXPECT_EQ(status.first_eval_loss(), 3.0);
  EXPECT_EQ(status.eval_loss(), 2.0);
  EXPECT_EQ(status.best_metric(), 2.0);
  EXPECT_EQ(status.best_step(), 5);
}

TEST(Progress, RewindingGoesToTheNewestCheckpointOrTheBeginning) {
  v1::JobStatus status;
  status.set_step(57);
  status.set_loss(1);
  status.set_best_metric(1);
  v1::CheckpointManifest checkpoint;
  checkpoint.mutable_state()->set_step(50);
  checkpoint.mutable_state()->set_tokens_seen(5000);
  v1::MetricRow row;
  row.set_loss(1.25);
  row.set_epoch(0.5);
  RewindTo(status, &checkpoint, row, std::nullopt);
  EXPECT_EQ(status.step(), 50);
  EXPECT_EQ(status.checkpoint_step(), 50);
  EXPECT_EQ(status.tokens_seen(), 5000);
  EXPECT_EQ(status.loss(), 1.25);
  EXPECT_FALSE(status.has_best_metric());
  RewindTo(status, nullptr, std::nullopt, std::nullopt);
  EXPECT_EQ(status.step(), 0);
  EXPECT_FALSE(status.has_loss());
}

TEST(Progress, LayersAreShownAsRanges) {
  v1::Plan plan;
  const int layers[][2] = {{0, 2}, {2, 1}, {3, 0}, {4, 3}};
  for (const auto& [first, count] : layers) {
    v1::StagePlan& stage = *plan.add_stages();
    stage.set_first_layer(first);
    stage.set_num_layers(count);
  }
  v1::RankPlan rank;
  for (const int stage : {0, 1, 2, 3}) rank.add_stages(stage);
  EXPECT_EQ(LayersOf(plan, rank), "0-1,2,4-6");
}

TEST(Progress, ASkippedStepIsASentenceWithItsCauseAndTheScale) {
  v1::SkippedStep skipped;
  skipped.set_step(3);
  skipped.set_reason("the loss of step 3 is not finite (stage 1)");
  skipped.set_loss_scale(4294967296.0);
  skipped.set_next_loss_scale(2147483648.0);
  EXPECT_EQ(SkippedText(skipped), "step 3 changed nothing: the loss of step 3 is not finite (stage 1); the loss scale goes from 4294967296 to 2147483648");
  skipped.set_next_loss_scale(4294967296.0);
  EXPECT_EQ(SkippedText(skipped), "step 3 changed nothing: the loss of step 3 is not finite (stage 1); the loss scale stays 4294967296");
}

TEST(Progress, ASuccessTellsTheStepsThatChangedNothing) {
  v1::JobStatus status;
  status.set_step(24);
  EXPECT_EQ(FinishedReason(status).message(), "trained 24 steps");
  status.set_skipped_steps(11);
  EXPECT_EQ(FinishedReason(status).message(), "trained 24 steps, of which 11 changed nothing");
  EXPECT_EQ(FinishedReason(status).remedy(), "");
  status.set_skipped_steps(24);
  status.set_loss_scale(1099511627776.0);
  EXPECT_EQ(FinishedReason(status).message(), "trained 24 steps, and none of them changed anything: the adapter is what it was at the start");
  EXPECT_EQ(FinishedReason(status).remedy(), "begin below the loss scale of 1099511627776, or use precision.compute: bf16");
}

}  // namespace
}  // namespace ppft::coordinator
