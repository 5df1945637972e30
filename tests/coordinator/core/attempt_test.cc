// Checkpoints, progress and directives of an attempt.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "coordinator/core/checkpoints.h"
#include "coordinator/core/directive.h"
#include "coordinator/core/progress.h"

namespace ppft::coordinator {
namespace {

using testing::ElementsAre;

// Two replicas of two stages over five layers; the ranks are listed out of order on purpose.
v1::Plan TwoByTwo() {
  v1::Plan plan;
  const int layers[2][2] = {{0, 3}, {3, 2}};
  for (int stage = 0; stage < 2; ++stage) {
    v1::StagePlan& held = *plan.add_stages();
    held.set_stage(stage);
    held.set_first_layer(layers[stage][0]);
    held.set_num_layers(layers[stage][1]);
    held.set_has_embedding(stage == 0);
    held.set_has_head(stage == 1);
  }
  for (const int rank : {3, 1, 0, 2}) {
    v1::RankPlan& held = *plan.add_ranks();
    held.set_rank(rank);
    held.set_replica(rank / 2);
    held.set_pipeline_rank(rank % 2);
    held.set_worker(absl::StrCat("worker-", rank));
    held.set_device("cpu:0");
    held.add_stages(rank % 2);
  }
  return plan;
}

v1::CheckpointManifest At(int64_t step, bool best = false) {
  v1::CheckpointManifest manifest;
  manifest.mutable_state()->set_step(step);
  manifest.set_best(best);
  return manifest;
}

TEST(Checkpoints, OwnersAreReplicaZeroInPipelineOrder) {
  EXPECT_THAT(StateOwners(TwoByTwo()), ElementsAre(0, 1));
  EXPECT_EQ(LossRank(TwoByTwo()), 1);
  EXPECT_EQ(LossRank(v1::Plan()), -1);
}

TEST(Checkpoints, OneIsWholeWhenEveryOwnerHasWritten) {
  v1::CheckpointWritten first, last;
  first.add_files()->mutable_content()->set_name("rank-0.safetensors");
  last.add_files()->mutable_content()->set_name("rank-1.safetensors");
  last.mutable_state()->set_step(20);
  last.set_best(true);
  last.set_eval_loss(1.5);
  EXPECT_FALSE(JoinCheckpoint(TwoByTwo(), {{1, last}}).has_value());
  EXPECT_FALSE(JoinCheckpoint(TwoByTwo(), {{1, last}, {2, first}}).has_value()) << "rank 2 is of another replica";
  const auto manifest = JoinCheckpoint(TwoByTwo(), {{0, first}, {1, last}});
  ASSERT_TRUE(manifest.has_value());
  EXPECT_EQ(manifest->state().step(), 20);
  EXPECT_TRUE(manifest->best());
  EXPECT_EQ(manifest->eval_loss(), 1.5);
  ASSERT_EQ(manifest->files_size(), 2);
  EXPECT_EQ(manifest->files(0).name(), "rank-0.safetensors");
}

TEST(Checkpoints, TheLimitNeverTakesTheNewestTheBestOrANeededOne) {
  struct Case {
    const char* sentence;
    std::vector<v1::CheckpointManifest> manifests;
    int limit;
    std::set<int64_t> needed;
    std::vector<int64_t> gone;
  };
  const Case cases[] = {
      {"below the limit all stay", {At(10), At(20)}, 3, {}, {}},
      {"the oldest goes first", {At(10), At(20), At(30), At(40)}, 2, {}, {10, 20}},
      {"the best stays", {At(10, true), At(20), At(30)}, 2, {}, {20}},
      {"an earlier best is no longer the best", {At(10, true), At(20, true), At(30)}, 2, {}, {10}},
      {"best and newest stay even above the limit", {At(10, true), At(20)}, 1, {}, {}},
      {"what a running attempt resumes from stays", {At(10), At(20), At(30)}, 1, {10}, {20}},
      {"a limit of one keeps the newest", {At(10), At(20), At(30)}, 1, {}, {10, 20}},
  };
  for (const Case& c : cases) EXPECT_EQ(CheckpointsToDelete(c.manifests, c.limit, c.needed), c.gone) << c.sentence;
}

TEST(Checkpoints, TheNewestUsableOneHasItsBestBesideIt) {
  const auto with_best = [](int64_t step, int64_t best) {
    v1::CheckpointManifest manifest = At(step);
    manifest.mutable_state()->set_best_step(best);
    return manifest;
  };
  const auto step_of = [](const v1::CheckpointManifest* manifest) { return manifest == nullptr ? int64_t{-1} : manifest->state().step(); };
  EXPECT_EQ(step_of(NewestUsable({}, true)), -1);
  EXPECT_EQ(step_of(NewestUsable({At(10), At(20)}, true)), 20) << "nothing was evaluated yet";
  EXPECT_EQ(step_of(NewestUsable({with_best(10, 10), with_best(20, 10)}, true)), 20);
  EXPECT_EQ(step_of(NewestUsable({with_best(10, 10), with_best(30, 20)}, true)), 10);
  EXPECT_EQ(step_of(NewestUsable({with_best(30, 20)}, true)), -1);
  EXPECT_EQ(step_of(NewestUsable({with_best(30, 20)}, false)), 30);
}

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
  v1::CheckpointManifest checkpoint = At(50);
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

v1::ModelRecord FiveLayers(bool tied) {
  v1::ModelRecord model;
  model.mutable_model()->set_tie_word_embeddings(tied);
  std::vector<std::string> names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"};
  for (int layer = 0; layer < 12; ++layer) names.push_back(absl::StrCat("model.layers.", layer, ".mlp.up_proj.weight"));
  for (const std::string& name : names) model.add_tensors()->mutable_tensor()->set_name(name);
  return model;
}

std::vector<std::string> Names(const std::vector<v1::TensorRef>& tensors) {
  std::vector<std::string> names;
  for (const v1::TensorRef& tensor : tensors) names.push_back(tensor.name());
  return names;
}

TEST(Directive, ARankGetsTheTensorsOfItsStagesAlone) {
  const v1::Plan plan = TwoByTwo();
  EXPECT_THAT(Names(TensorsOf(FiveLayers(false), plan, plan.ranks(2))), ElementsAre("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight",
                                                                                    "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"));
  EXPECT_THAT(Names(TensorsOf(FiveLayers(false), plan, plan.ranks(1))),
              ElementsAre("model.norm.weight", "lm_head.weight", "model.layers.3.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"));
}

TEST(Directive, WithTiedEmbeddingsTheHeadGetsTheEmbedding) {
  const v1::Plan plan = TwoByTwo();
  EXPECT_THAT(Names(TensorsOf(FiveLayers(true), plan, plan.ranks(1))),
              ElementsAre("model.embed_tokens.weight", "model.norm.weight", "model.layers.3.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"));
}

TEST(Directive, PeersAreNamedOnlyWhenAllListen) {
  v1::JobRecord record;
  record.mutable_job()->set_id("job-a");
  record.mutable_job()->mutable_status()->set_attempt_epoch(4);
  *record.mutable_plan() = TwoByTwo();
  const v1::ModelRecord model = FiveLayers(false);
  std::map<int32_t, std::string> endpoints = {{0, "h:1"}, {1, "h:2"}, {2, "h:3"}};
  AttemptInputs inputs{&record, &model, nullptr, nullptr, {}, &endpoints};
  EXPECT_EQ(DirectiveOf(inputs, record.plan().ranks(2)).peers_size(), 0);
  endpoints[3] = "h:4";
  const v1::RankDirective directive = DirectiveOf(inputs, record.plan().ranks(2));
  ASSERT_EQ(directive.peers_size(), 4);
  EXPECT_EQ(directive.peers(3).address(), "h:4");
  EXPECT_EQ(directive.rank().rank(), 0);
  EXPECT_EQ(directive.rank().epoch(), 4);
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

TEST(Directive, TheMergedTypeIsTheBaseModelsUnlessNamed) {
  v1::JobSpec spec;
  v1::Model model;
  model.set_dtype("BF16");
  EXPECT_EQ(MergeDtype(spec, model), "bfloat16");
  spec.mutable_output()->set_merge_dtype("float32");
  EXPECT_EQ(MergeDtype(spec, model), "float32");
}

}  // namespace
}  // namespace ppft::coordinator
