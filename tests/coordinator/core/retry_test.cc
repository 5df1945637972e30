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
  for (int i = 0; i < 2; ++i) state = DecideRetry(state, Lost(), 0, 2).state;
  Failure failure = Lost();
  failure.step = 1499;
  EXPECT_FALSE(DecideRetry(state, failure, 500, 2).restart);
  failure.step = 1500;
  const RetryDecision refilled = DecideRetry(state, failure, 500, 2);
  EXPECT_TRUE(refilled.restart);
  EXPECT_EQ(refilled.state.restarts(), 1);
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
}

TEST(Retry, ABrokenLinkAndAnUnexplainedExitWaitForTheirCause) {
  v1::Failure link;
  *link.mutable_reason() = MakeReason("COMM_ERROR", "rank 1: closed");
  link.set_peer(1);
  v1::Exited plain, killed;
  plain.set_status(1);
  killed.set_signal(SIGKILL);
  const Failure a = FailureOf(link, 0, 0), b = FailureOf(plain, 0, "w", 0), c = FailureOf(killed, 0, "w", 0);
  EXPECT_TRUE(a.waits_for_cause());
  EXPECT_TRUE(b.waits_for_cause());
  EXPECT_FALSE(c.waits_for_cause());
  EXPECT_LT(a.weight, b.weight);
  EXPECT_LT(b.weight, c.weight);
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
