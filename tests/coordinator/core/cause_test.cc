// The first cause of an attempt's end among many voices.
#include "coordinator/core/cause.h"

#include <gtest/gtest.h>

#include <csignal>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "coordinator/core/job_state.h"

namespace ppft::coordinator {
namespace {

v1::Plan ThreeRanks() {
  v1::Plan plan;
  for (int rank = 0; rank < 3; ++rank) {
    v1::RankPlan& one = *plan.add_ranks();
    one.set_rank(rank);
    one.set_worker(absl::StrCat("worker-", rank));
  }
  return plan;
}

Failure Says(int rank, const char* code, const char* message, int peer = -1) {
  v1::Failure report;
  *report.mutable_reason() = MakeReason(code, message);
  report.set_peer(peer);
  return FailureOf(report, rank, 40);
}

Failure Lost(int rank, int peer) { return Says(rank, "COMM_ERROR", "no sign of life", peer); }
Failure Stopped(int rank) { return Says(rank, "COMM_ERROR", "the trainer's process is stopped", rank); }

Failure Ended(int rank, int status, int signal) {
  v1::Exited report;
  report.set_status(status);
  report.set_signal(signal);
  return FailureOf(report, rank, absl::StrCat("worker-", rank), 40);
}

struct Case {
  const char* sentence;
  std::vector<Failure> failures;  // in the order of arrival
  std::set<std::string> unreachable;
  bool settled;
  const char* code;
  std::vector<const char*> words;  // in the message
  const char* worker;              // whom it counts against
};

std::vector<Case> Cases() {
  return {
      {"a neighbour that was killed: its own death, with who saw it",
       {Lost(0, 1), Ended(1, 0, SIGKILL)},
       {},
       true,
       "WORKER_CRASHED",
       {"rank 1", "worker-1", "signal 9", "COMM_ERROR: lost by rank 0 on worker-0"},
       "worker-1"},
      {"a peer that stands still says nothing: the survivor names it",
       {Lost(0, 1)},
       {},
       false,
       "COMM_ERROR",
       {"rank 0 on worker-0 lost rank 1 on worker-1", "no sign of life"},
       "worker-1"},
      {"the survivor's exit is explained by its own word", {Lost(0, 1), Ended(0, 1, 0)}, {}, false, "COMM_ERROR", {"lost rank 1 on worker-1"}, "worker-1"},
      {"also if it falls over while it leaves", {Lost(0, 1), Ended(0, 0, SIGABRT)}, {}, false, "COMM_ERROR", {"lost rank 1 on worker-1"}, "worker-1"},
      {"a neighbour that exits without a word", {Lost(0, 1), Ended(1, 1, 0)}, {}, false, "WORKER_CRASHED", {"rank 1", "status 1 without a reason"}, "worker-1"},
      {"links are followed to the rank that says nothing",
       {Lost(0, 1), Lost(1, 2)},
       {},
       false,
       "COMM_ERROR",
       {"rank 1 on worker-1 lost rank 2 on worker-2"},
       "worker-2"},
      {"whatever the order", {Lost(1, 2), Lost(0, 1)}, {}, false, "COMM_ERROR", {"rank 1 on worker-1 lost rank 2 on worker-2"}, "worker-2"},
      {"two that lost each other: the first word counts", {Lost(0, 1), Lost(1, 0)}, {}, false, "COMM_ERROR", {"rank 0 on worker-0 lost rank 1"}, "worker-1"},
      {"a NaN beats the links that it broke",
       {Lost(0, 1), Says(1, "NUMERIC_DIVERGENCE", "the loss is NaN")},
       {},
       true,
       "NUMERIC_DIVERGENCE",
       {"the loss is NaN", "lost by rank 0"},
       "worker-1"},
      {"out of memory beats a device error of another rank",
       {Says(0, "DEVICE_ERROR", "illegal address"), Says(1, "OUT_OF_DEVICE_MEMORY", "12 GiB")},
       {},
       true,
       "OUT_OF_DEVICE_MEMORY",
       {"12 GiB"},
       "worker-1"},
      {"a device error beats the links that it broke", {Lost(2, 1), Says(1, "DEVICE_ERROR", "Xid 79")}, {}, true, "DEVICE_ERROR", {"Xid 79"}, "worker-1"},
      {"a crash before any link is the cause", {Ended(0, 0, SIGSEGV), Lost(1, 0)}, {}, true, "WORKER_CRASHED", {"signal 11", "lost by rank 1"}, "worker-0"},
      {"a crash of one that nobody lost, after others lost a third, follows from that",
       {Lost(1, 2), Ended(0, 0, SIGABRT)},
       {},
       false,
       "COMM_ERROR",
       {"rank 1 on worker-1 lost rank 2 on worker-2"},
       "worker-2"},
      {"a hang that the agent saw",
       {Lost(0, 1), Says(1, "STAGE_HUNG", "no progress for 3s in section \"forward\"")},
       {},
       true,
       "STAGE_HUNG",
       {"forward"},
       "worker-1"},
      {"a stopped process that the agent saw: the same word as its neighbour's",
       {Lost(0, 1), Stopped(1)},
       {},
       true,
       "COMM_ERROR",
       {"is stopped", "lost by rank 0 on worker-0"},
       "worker-1"},
      {"its worker's connection broke too", {Lost(0, 1)}, {"worker-1"}, false, "WORKER_LOST", {"worker-1"}, "worker-1"},
      {"another worker's connection is not to blame", {Lost(0, 1)}, {"worker-2"}, false, "COMM_ERROR", {"lost rank 1 on worker-1"}, "worker-1"},
      {"an agent that cannot fetch or upload names no peer", {Says(0, "COMM_ERROR", "upload failed")}, {}, false, "COMM_ERROR", {"upload failed"}, "worker-0"},
      {"with an unexplained exit beside it, that one counts",
       {Says(0, "COMM_ERROR", "upload failed"), Ended(1, 1, 0)},
       {},
       false,
       "WORKER_CRASHED",
       {"rank 1"},
       "worker-1"},
      {"an exit alone", {Ended(2, 3, 0)}, {}, false, "WORKER_CRASHED", {"status 3"}, "worker-2"},
  };
}

TEST(Cause, IsTheNearestToTheFirst) {
  for (const Case& c : Cases()) {
    AttemptFailures failures;
    EXPECT_TRUE(failures.empty());
    for (const Failure& failure : c.failures) failures.Add(failure);
    EXPECT_EQ(failures.settled(), c.settled) << c.sentence;
    const Failure cause = failures.Cause(ThreeRanks(), c.unreachable);
    EXPECT_EQ(cause.reason.code(), c.code) << c.sentence;
    EXPECT_EQ(cause.worker, c.worker) << c.sentence;
    EXPECT_EQ(cause.step, 40) << c.sentence;
    for (const char* word : c.words) EXPECT_TRUE(absl::StrContains(cause.reason.message(), word)) << c.sentence << ": " << cause.reason.message();
  }
}

TEST(Cause, IsForgottenWithItsAttempt) {
  AttemptFailures failures;
  failures.Add(Lost(0, 1));
  failures.Clear();
  EXPECT_TRUE(failures.empty());
  EXPECT_FALSE(failures.settled());
}

}  // namespace
}  // namespace ppft::coordinator
