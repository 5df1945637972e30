// What happens after a failure: restart, when, or the end. PURE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "ppft/v1/job.pb.h"
#include "ppft/v1/stored.pb.h"
#include "ppft/v1/trainer.pb.h"

namespace ppft::coordinator {

// One observed failure of an attempt.
struct Failure {
  v1::Reason reason;
  int64_t step = 0;            // the newest step that was reported before it
  bool deterministic = false;  // the trainer's own error: the same input would fail again. A kill or a lost worker is not
  // How near it is to the first cause: a heavier one replaces a lighter one that waits. Those below kCause wait for a moment: a broken link, or an exit
  // without a reason, mostly follows from a peer's death.
  enum class Weight { kBrokenLink, kUnexplainedExit, kCause, kUserError };
  Weight weight = Weight::kCause;
  int32_t rank = -1;              // who reported it; -1: the coordinator saw it
  int32_t peer = -1;              // a broken link: the rank that was lost; -1: not known
  bool exit = false;              // the agent's word about a trainer that ended, not the trainer's own
  bool costs_checkpoint = false;  // it took a checkpoint away, of which there are only so many: the budget stays
  std::string worker;             // whom it is counted against; "" = the worker of `rank`
};

Failure FailureOf(const v1::Failure& report, int32_t rank, int64_t status_step);
Failure FailureOf(const v1::Exited& report, int32_t rank, const std::string& worker, int64_t status_step);

struct RetryDecision {
  bool restart = false;
  bool pause = false;    // as `restart`, but the job waits in PAUSED and its budget stays
  absl::Duration delay;  // before the next attempt
  v1::Reason reason;     // of the move to RECOVERING or FAILED
  v1::RetryState state;  // not_before_unix_ms is left to the caller
  std::string excluded;  // the worker that this failure excludes from the job; "" = none
};

// So many steps since the last restart that counted refill the budget of restarts.
constexpr int64_t kGoodSteps = 1000;

// Errors of the user end the job. A full disk is the operator's: the job pauses. Others restart it, up to `max_restarts` times without kGoodSteps steps in
// between, also over several attempts: at once the first time after a checkpoint, then after 0.5 s, 1 s, 2 s … 30 s. A deterministic failure at one step three
// times in a row is the job's own: POISON_STEP; EXPORT_MISMATCH ends it the second time. The failure counts against `failure.worker`; a worker that failed the
// job twice is excluded. `resume_step`: where the attempt began.
RetryDecision DecideRetry(const v1::RetryState& state, const Failure& failure, int64_t resume_step, int max_restarts);

// Workers that failed the job twice, by name: it goes elsewhere while others can take it (queue.h).
std::vector<std::string> ExcludedWorkers(const v1::RetryState& state);

}  // namespace ppft::coordinator
