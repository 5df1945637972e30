#include "coordinator/core/retry.h"

#include <gtest/gtest.h>

#include <csignal>

#include "coordinator/core/job_state.h"

namespace ppft::coordinator {
namespace {

Failure Lost() { return Failure{MakeReason("WORKER_LOST", "worker-1 was restarted"), 10}; }

Failure OwnError(int64_t step) {
  v1::Failure report;
  *report.mutable_reason() = MakeReason("DEVICE_ERROR", "an illegal address");
  report.set_step(step);
  return FailureOf(report, 0, 0);
}

TEST(Retry, DelaysGrowFromNothingToThirtySeconds) {
  v1::RetryState state;
  std::vector<double> seconds;
  for (int i = 0; i < 10; ++i) {
    const RetryDecision decision = DecideRetry(state, Lost(), 0, 100);
    ASSERT_TRUE(decision.restart);
    seconds.push_back(absl::ToDoubleSeconds(decision.delay));
    state = decision.state;
  }
  EXPECT_EQ(seconds, (std::vector<double>{0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30}));
}

TEST(Retry, TheBudgetEndsTheJobWithItsFirstCause) {
  v1::RetryState state;
  for (int i = 0; i < 2; ++i) state = DecideRetry(state, Lost(), 0, 2).state;
  const RetryDecision decision = DecideRetry(state, Lost(), 0, 2);
  EXPECT_FALSE(decision.restart);
  EXPECT_EQ(decision.reason.code(), "WORKER_LOST");
  EXPECT_NE(decision.reason.message().find("2 restarts"), std::string::npos) << decision.reason.message();
}

TEST(Retry, AThousandGoodStepsRefillTheBudgetAndFewerDoNot) {
  v1::RetryState state;
  Failure failure = Lost();
  failure.step = 550;
  for (int i = 0; i < 2; ++i) state = DecideRetry(state, failure, 500, 2).state;
  failure.step = 1499;
  EXPECT_FALSE(DecideRetry(state, failure, 500, 2).restart);
  failure.step = 1500;
  const RetryDecision refilled = DecideRetry(state, failure, 500, 2);
  EXPECT_TRUE(refilled.restart);
  EXPECT_EQ(refilled.state.restarts(), 1);
}

TEST(Retry, GoodStepsAreSummedOverAttemptsThatEndedWithoutACount) {
  Failure lost = Lost(), corrupt{MakeReason("CHECKPOINT_CORRUPT", "damaged"), 0}, full{MakeReason("DISK_FULL", "no room"), 0};
  corrupt.costs_checkpoint = true;
  lost.step = 450;
  const v1::RetryState spent = DecideRetry({}, lost, 400, 1).state;  // its only restart; goes on at 400
  full.step = 900;
  const v1::RetryState paused = DecideRetry(spent, full, 400, 1).state;  // goes on at 880
  lost.step = 1399;
  EXPECT_FALSE(DecideRetry(paused, lost, 880, 1).restart) << "999 steps";
  lost.step = 1400;
  const RetryDecision refilled = DecideRetry(paused, lost, 880, 1);
  EXPECT_TRUE(refilled.restart) << "no attempt had 1,000 by itself";
  EXPECT_EQ(refilled.state.restarts(), 1);
  // Back to the beginning, and a pause on the way: the steps count from there.
  v1::RetryState back = DecideRetry(refilled.state, corrupt, 1390, 1).state;
  full.step = 600;
  back = DecideRetry(back, full, 0, 1).state;
  lost.step = 999;
  EXPECT_FALSE(DecideRetry(back, lost, 600, 1).restart);
  lost.step = 1000;
  EXPECT_TRUE(DecideRetry(back, lost, 600, 1).restart);
}

TEST(Retry, AStateOfAnEarlierVersionCountsOn) {
  v1::RetryState state;  // it kept the step of the last failure of any kind
  state.set_restarts(1);
  state.set_last_step(300);
  Failure lost = Lost();
  lost.step = 1250;
  EXPECT_FALSE(DecideRetry(state, lost, 260, 1).restart);
  lost.step = 1260;
  EXPECT_TRUE(DecideRetry(state, lost, 260, 1).restart);
}

TEST(Retry, AModelThatDiffersFromItsFilesTwiceEndsTheJobAndCostsNoCheckpoint) {
  v1::Failure report;
  *report.mutable_reason() = MakeReason("EXPORT_MISMATCH", "the merged read back from disk differs", "set output.merge_dtype: float32");
  EXPECT_EQ(report.reason().owner(), "INFRASTRUCTURE");
  const Failure failure = FailureOf(report, 0, 40);
  EXPECT_FALSE(failure.costs_checkpoint);
  const RetryDecision first = DecideRetry({}, failure, 20, 100);
  EXPECT_TRUE(first.restart) << "the disk or the memory may have failed once";
  const RetryDecision second = DecideRetry(first.state, failure, 40, 100);
  EXPECT_FALSE(second.restart);
  EXPECT_EQ(second.reason.code(), "EXPORT_MISMATCH");
  EXPECT_EQ(second.reason.remedy(), "set output.merge_dtype: float32");
}

TEST(Retry, ANewCheckpointEndsTheDelayAndNotTheCount) {
  v1::RetryState state;
  for (int i = 0; i < 4; ++i) state = DecideRetry(state, Lost(), 0, 5).state;
  state.set_restarts_since_checkpoint(0);
  const RetryDecision fifth = DecideRetry(state, Lost(), 0, 5);
  EXPECT_TRUE(fifth.restart);
  EXPECT_EQ(fifth.delay, absl::ZeroDuration());
  EXPECT_FALSE(DecideRetry(fifth.state, Lost(), 0, 5).restart);
}

TEST(Retry, ADamagedCheckpointCostsNoRestartAndNoWorkersGoodName) {
  Failure failure{MakeReason("CHECKPOINT_CORRUPT", "a file of the checkpoint of step 40 is damaged"), 40};
  failure.worker = "worker-0";
  failure.costs_checkpoint = true;
  v1::RetryState state;
  for (int i = 0; i < 4; ++i) {
    const RetryDecision decision = DecideRetry(state, failure, 40, 0);
    ASSERT_TRUE(decision.restart);
    EXPECT_FALSE(decision.pause);
    EXPECT_EQ(decision.delay, absl::ZeroDuration());
    state = decision.state;
  }
  EXPECT_EQ(state.restarts(), 0);
  EXPECT_TRUE(ExcludedWorkers(state).empty());
}

TEST(Retry, DamageOfTheStoreIsNoStepsAndNoWorkersFault) {
  v1::Failure report;
  *report.mutable_reason() = MakeReason("STORE_UNREADABLE", "train.safetensors is damaged");
  Failure failure = FailureOf(report, 0, 40);
  failure.worker = "worker-0";
  v1::RetryState state;
  for (int i = 0; i < 4; ++i) {
    const RetryDecision decision = DecideRetry(state, failure, 40, 4);
    ASSERT_TRUE(decision.restart) << i;
    state = decision.state;
  }
  EXPECT_TRUE(ExcludedWorkers(state).empty());
  EXPECT_EQ(DecideRetry(state, failure, 40, 4).reason.code(), "STORE_UNREADABLE");
}

TEST(Retry, NoRestartsAllowedMeansTheFirstFailureEndsIt) { EXPECT_FALSE(DecideRetry({}, Lost(), 0, 0).restart); }

TEST(Retry, ErrorsOfTheUserNeverRestart) {
  v1::Failure report;
  *report.mutable_reason() = MakeReason("NUMERIC_DIVERGENCE", "the loss is NaN");
  const RetryDecision decision = DecideRetry({}, FailureOf(report, 0, 5), 0, 5);
  EXPECT_FALSE(decision.restart);
  EXPECT_EQ(decision.reason.code(), "NUMERIC_DIVERGENCE");
}

TEST(Retry, TheSameOwnErrorAtTheSameStepThreeTimesIsPoison) {
  v1::RetryState state;
  for (int i = 0; i < 2; ++i) {
    const RetryDecision decision = DecideRetry(state, OwnError(40), 0, 100);
    ASSERT_TRUE(decision.restart) << "time " << i + 1;
    state = decision.state;
  }
  const RetryDecision third = DecideRetry(state, OwnError(40), 0, 100);
  EXPECT_FALSE(third.restart);
  EXPECT_EQ(third.reason.code(), "POISON_STEP");
  EXPECT_EQ(third.reason.owner(), "USER");
}

TEST(Retry, AnotherStepOrAKillInBetweenBreaksTheRow) {
  for (const Failure& between : {OwnError(41), Lost()}) {
    v1::RetryState state = DecideRetry({}, OwnError(40), 0, 100).state;
    state = DecideRetry(state, OwnError(40), 0, 100).state;
    state = DecideRetry(state, between, 0, 100).state;
    EXPECT_TRUE(DecideRetry(state, OwnError(40), 0, 100).restart) << between.reason.code();
  }
}

TEST(Retry, KillsAtOneStepAreNeverPoison) {
  v1::Exited killed;
  killed.set_signal(SIGKILL);
  v1::RetryState state;
  for (int i = 0; i < 6; ++i) {
    const RetryDecision decision = DecideRetry(state, FailureOf(killed, 0, "worker-0", 40), 0, 100);
    ASSERT_TRUE(decision.restart) << "kill " << i + 1;
    EXPECT_EQ(decision.reason.code(), "WORKER_CRASHED");
    state = decision.state;
  }
}

TEST(Retry, ACrashInNativeCodeIsTheJobsOwnWhenItRepeats) {
  v1::Exited crashed;
  crashed.set_signal(SIGSEGV);
  EXPECT_TRUE(FailureOf(crashed, 0, "worker-0", 40).deterministic);
}

TEST(Retry, AnExitNamesRankWorkerSignalAndLastLine) {
  v1::Exited exited;
  exited.set_signal(SIGKILL);
  exited.set_detail("first line\nout of memory\n\n");
  const std::string message = FailureOf(exited, 3, "worker-7", 0).reason.message();
  for (const char* word : {"rank 3", "worker-7", "signal 9", "out of memory"}) EXPECT_NE(message.find(word), std::string::npos) << message;
  EXPECT_EQ(message.find("first line"), std::string::npos);
  exited.set_detail("terminate called\n2026-11-23T13:31:04.918Z I trainer: checkpoint of step 20 written\n");
  EXPECT_EQ(FailureOf(exited, 3, "worker-7", 0).reason.message(), "the trainer of rank 3 on worker-7 was ended by signal 9 (Killed)") << "no cause";
  exited.set_detail("2026-11-23T13:31:04.918Z E trainer: no memory\n");
  EXPECT_NE(FailureOf(exited, 3, "worker-7", 0).reason.message().find("no memory"), std::string::npos);
}

TEST(Retry, ABrokenLinkAndAnUnexplainedExitWaitForTheirCause) {
  v1::Failure link;
  *link.mutable_reason() = MakeReason("COMM_ERROR", "rank 1: closed");
  link.set_peer(1);
  v1::Exited plain, killed;
  plain.set_status(1);
  killed.set_signal(SIGKILL);
  const Failure a = FailureOf(link, 0, 0), b = FailureOf(plain, 0, "w", 0), c = FailureOf(killed, 0, "w", 0);
  EXPECT_EQ(a.weight, Failure::Weight::kBrokenLink);
  EXPECT_EQ(b.weight, Failure::Weight::kUnexplainedExit);
  EXPECT_EQ(c.weight, Failure::Weight::kCause);
}

TEST(Retry, AFullDiskPausesAndCostsNoRestart) {
  v1::Failure report;
  *report.mutable_reason() = MakeReason("DISK_FULL", "no room under --work_dir");
  v1::RetryState state;
  for (int i = 0; i < 20; ++i) {
    const RetryDecision decision = DecideRetry(state, FailureOf(report, 0, 40), 0, 1);
    ASSERT_TRUE(decision.restart && decision.pause) << "time " << i + 1;
    EXPECT_GT(decision.delay, absl::ZeroDuration());
    state = decision.state;
  }
  EXPECT_TRUE(DecideRetry(state, Lost(), 0, 1).restart) << "the budget is whole";
}

TEST(Retry, AWorkerThatFailsTheJobTwiceIsExcluded) {
  Failure by_one = Lost(), by_two = Lost();
  by_one.worker = "worker-1";
  by_two.worker = "worker-2";
  v1::RetryState state;
  struct Row {
    const Failure& failure;
    const char* excluded;
  };
  for (const Row& row : {Row{by_one, ""}, Row{by_two, ""}, Row{by_one, "worker-1"}, Row{by_one, ""}, Row{by_two, "worker-2"}}) {
    const RetryDecision decision = DecideRetry(state, row.failure, 0, 100);
    EXPECT_EQ(decision.excluded, row.excluded);
    state = decision.state;
  }
  EXPECT_EQ(ExcludedWorkers(state), (std::vector<std::string>{"worker-1", "worker-2"}));
}

TEST(Retry, ErrorsOfTheUserCountAgainstNoWorker) {
  v1::Failure report;
  *report.mutable_reason() = MakeReason("NUMERIC_DIVERGENCE", "the loss is NaN");
  Failure failure = FailureOf(report, 0, 5);
  failure.worker = "worker-1";
  EXPECT_EQ(DecideRetry({}, failure, 0, 5).state.failures_by_worker_size(), 0);
}

TEST(Retry, AFailureWithoutAReasonIsInfrastructure) {
  const Failure failure = FailureOf(v1::Failure(), 1, 3);
  EXPECT_EQ(failure.reason.owner(), "INFRASTRUCTURE");
  EXPECT_EQ(failure.step, 3);
}

}  // namespace
}  // namespace ppft::coordinator
