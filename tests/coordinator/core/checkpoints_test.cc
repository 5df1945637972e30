#include "coordinator/core/checkpoints.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/coordinator/core/two_by_two.h"

namespace ppft::coordinator {
namespace {

using testing::ElementsAre;

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

}  // namespace
}  // namespace ppft::coordinator
