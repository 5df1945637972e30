// What happens after a failure: restart, when, or the end. PURE.
#pragma once

#include <cstdint>

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
};

Failure FailureOf(const v1::Failure& report, int64_t status_step);
Failure FailureOf(const v1::Exited& report, int32_t rank, const std::string& worker, int64_t status_step);

// How near a failure is to the first cause: a larger one replaces a smaller one that waits. A broken link (COMM_ERROR) mostly follows from a
// peer's death, so it is the smallest.
int CauseWeight(const v1::Reason& reason);

struct RetryDecision {
  bool restart = false;
  absl::Duration delay;  // before the next attempt
  v1::Reason reason;     // of the move to RECOVERING or FAILED
  v1::RetryState state;  // not_before_unix_ms is left to the caller
};

// Errors of the user end the job. Others restart it, up to `max_restarts` times without a new checkpoint in between: at once the first time,
// then after 0.5 s, 1 s, 2 s … 30 s. A deterministic failure at one step three times in a row is the job's own: POISON_STEP.
RetryDecision DecideRetry(const v1::RetryState& state, const Failure& failure, int max_restarts);

}  // namespace ppft::coordinator
