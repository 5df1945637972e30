#include "coordinator/core/job_state.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

namespace ppft::coordinator {
namespace {

using State = v1::JobState;

const std::map<State, std::set<State>>& Expected() {
  static const auto* moves = new std::map<State, std::set<State>>{
      {v1::JOB_STATE_PREPARING, {v1::JOB_STATE_QUEUED, v1::JOB_STATE_PAUSED, v1::JOB_STATE_CANCELLING, v1::JOB_STATE_FAILED}},
      {v1::JOB_STATE_QUEUED, {v1::JOB_STATE_STARTING, v1::JOB_STATE_PAUSED, v1::JOB_STATE_CANCELLING, v1::JOB_STATE_FAILED}},
      {v1::JOB_STATE_PAUSED, {v1::JOB_STATE_PREPARING, v1::JOB_STATE_QUEUED, v1::JOB_STATE_CANCELLING, v1::JOB_STATE_FAILED}},
      {v1::JOB_STATE_STARTING, {v1::JOB_STATE_RUNNING, v1::JOB_STATE_RECOVERING, v1::JOB_STATE_CANCELLING, v1::JOB_STATE_FAILED}},
      {v1::JOB_STATE_RUNNING, {v1::JOB_STATE_EXPORTING, v1::JOB_STATE_RECOVERING, v1::JOB_STATE_CANCELLING, v1::JOB_STATE_FAILED}},
      {v1::JOB_STATE_EXPORTING, {v1::JOB_STATE_SUCCEEDED, v1::JOB_STATE_RECOVERING, v1::JOB_STATE_CANCELLING, v1::JOB_STATE_FAILED}},
      {v1::JOB_STATE_RECOVERING, {v1::JOB_STATE_QUEUED, v1::JOB_STATE_CANCELLING, v1::JOB_STATE_FAILED}},
      {v1::JOB_STATE_CANCELLING, {v1::JOB_STATE_CANCELLED}},
      {v1::JOB_STATE_SUCCEEDED, {}},
      {v1::JOB_STATE_CANCELLED, {}},
      {v1::JOB_STATE_FAILED, {}},
  };
  return *moves;
}

TEST(JobState, EveryPairOfStatesIsLegalOrNotAsDesigned) {
  ASSERT_EQ(Expected().size(), static_cast<size_t>(v1::JobState_ARRAYSIZE - 1)) << "every state but UNSPECIFIED";
  for (const auto& [from, targets] : Expected()) {
    for (int to = v1::JobState_MIN; to < v1::JobState_ARRAYSIZE; ++to) {
      EXPECT_EQ(IsLegalMove(from, static_cast<State>(to)), targets.count(static_cast<State>(to)) > 0)
          << StateWord(from) << " -> " << StateWord(static_cast<State>(to));
    }
    EXPECT_EQ(IsTerminal(from), targets.empty()) << StateWord(from);
  }
}

TEST(JobState, ThereIsOneRoadIntoStarting) {
  for (const LegalMove& move : kLegalMoves) {
    if (move.to == v1::JOB_STATE_STARTING) {
      EXPECT_EQ(move.from, v1::JOB_STATE_QUEUED);
    }
  }
}

TEST(JobState, AMoveIsAnEventWithReasonActorAndTime) {
  v1::JobRecord record;
  record.mutable_job()->set_id("job-a");
  record.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_QUEUED);
  record.mutable_job()->mutable_status()->set_attempt_epoch(3);
  record.mutable_job()->mutable_status()->set_queue_position(2);
  const auto event = MoveJob(record, v1::JOB_STATE_STARTING, MakeReason("PLANNED", "two stages"), "coordinator", absl::FromUnixSeconds(100));
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_EQ(event->from(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(event->to(), v1::JOB_STATE_STARTING);
  EXPECT_EQ(event->actor(), "coordinator");
  EXPECT_EQ(event->reason().message(), "two stages");
  EXPECT_EQ(event->time().seconds(), 100);
  EXPECT_EQ(event->attempt_epoch(), 3);
  EXPECT_EQ(record.job().status().state(), v1::JOB_STATE_STARTING);
  EXPECT_EQ(record.job().status().queue_position(), 0);
}

TEST(JobState, AForbiddenMoveChangesNothing) {
  v1::JobRecord record;
  record.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_SUCCEEDED);
  const std::string before = record.SerializeAsString();
  EXPECT_EQ(MoveJob(record, v1::JOB_STATE_RUNNING, MakeReason("READY", ""), "coordinator", absl::FromUnixSeconds(1)).status().code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(record.SerializeAsString(), before);
}

TEST(JobState, TimeInRunningAddsUpOverAttempts) {
  v1::JobRecord record;
  record.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_STARTING);
  const auto move = [&](State to, int64_t second) { ASSERT_TRUE(MoveJob(record, to, MakeReason("X", ""), "coordinator", absl::FromUnixSeconds(second)).ok()); };
  move(v1::JOB_STATE_RUNNING, 10);
  move(v1::JOB_STATE_RECOVERING, 15);
  move(v1::JOB_STATE_QUEUED, 100);
  move(v1::JOB_STATE_STARTING, 200);
  move(v1::JOB_STATE_RUNNING, 300);
  move(v1::JOB_STATE_FAILED, 307);
  EXPECT_EQ(record.running_ms(), 12000);
  EXPECT_EQ(record.job().start_time().seconds(), 10) << "the first RUNNING";
  EXPECT_EQ(record.job().end_time().seconds(), 307);
}

TEST(JobState, GivingUpRaisesTheEpoch) {
  v1::JobRecord record;
  record.mutable_job()->mutable_status()->set_attempt_epoch(7);
  record.set_resume_step(40);
  record.set_finished(true);
  GiveUpAttempt(record);
  EXPECT_EQ(record.job().status().attempt_epoch(), 8);
  EXPECT_EQ(record.resume_step(), 0);
  EXPECT_FALSE(record.finished());
}

TEST(JobState, TheOwnerOfAReasonFollowsFromItsCode) {
  EXPECT_EQ(MakeReason("DATASET_INVALID", "").owner(), "USER");
  EXPECT_EQ(MakeReason("WORKER_LOST", "").owner(), "INFRASTRUCTURE");
  EXPECT_EQ(MakeReason("NO_CAPACITY", "").owner(), "OPERATOR");
  EXPECT_EQ(MakeReason("PLANNED", "").owner(), "");
}

}  // namespace
}  // namespace ppft::coordinator
