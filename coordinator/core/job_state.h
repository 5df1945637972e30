// States of a job, the one table of legal moves, and the words of reasons. PURE.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "ppft/v1/job.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

struct LegalMove {
  v1::JobState from;
  v1::JobState to;
};

inline constexpr LegalMove kLegalMoves[] = {
    {v1::JOB_STATE_PREPARING, v1::JOB_STATE_QUEUED},     {v1::JOB_STATE_PREPARING, v1::JOB_STATE_CANCELLING},
    {v1::JOB_STATE_PREPARING, v1::JOB_STATE_FAILED},     {v1::JOB_STATE_PREPARING, v1::JOB_STATE_PAUSED},
    {v1::JOB_STATE_PAUSED, v1::JOB_STATE_PREPARING},     {v1::JOB_STATE_QUEUED, v1::JOB_STATE_STARTING},
    {v1::JOB_STATE_QUEUED, v1::JOB_STATE_PAUSED},        {v1::JOB_STATE_QUEUED, v1::JOB_STATE_CANCELLING},
    {v1::JOB_STATE_QUEUED, v1::JOB_STATE_FAILED},        {v1::JOB_STATE_PAUSED, v1::JOB_STATE_QUEUED},
    {v1::JOB_STATE_PAUSED, v1::JOB_STATE_CANCELLING},    {v1::JOB_STATE_PAUSED, v1::JOB_STATE_FAILED},
    {v1::JOB_STATE_STARTING, v1::JOB_STATE_RUNNING},     {v1::JOB_STATE_STARTING, v1::JOB_STATE_RECOVERING},
    {v1::JOB_STATE_STARTING, v1::JOB_STATE_CANCELLING},  {v1::JOB_STATE_STARTING, v1::JOB_STATE_FAILED},
    {v1::JOB_STATE_RUNNING, v1::JOB_STATE_EXPORTING},    {v1::JOB_STATE_RUNNING, v1::JOB_STATE_RECOVERING},
    {v1::JOB_STATE_RUNNING, v1::JOB_STATE_CANCELLING},   {v1::JOB_STATE_RUNNING, v1::JOB_STATE_FAILED},
    {v1::JOB_STATE_EXPORTING, v1::JOB_STATE_SUCCEEDED},  {v1::JOB_STATE_EXPORTING, v1::JOB_STATE_RECOVERING},
    {v1::JOB_STATE_EXPORTING, v1::JOB_STATE_CANCELLING}, {v1::JOB_STATE_EXPORTING, v1::JOB_STATE_FAILED},
    {v1::JOB_STATE_RECOVERING, v1::JOB_STATE_QUEUED},    {v1::JOB_STATE_RECOVERING, v1::JOB_STATE_CANCELLING},
    {v1::JOB_STATE_RECOVERING, v1::JOB_STATE_FAILED},    {v1::JOB_STATE_CANCELLING, v1::JOB_STATE_CANCELLED},
};

constexpr bool IsLegalMove(v1::JobState from, v1::JobState to) {
  for (const LegalMove& move : kLegalMoves) {
    if (move.from == from && move.to == to) return true;
  }
  return false;
}

constexpr bool IsTerminal(v1::JobState state) { return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_CANCELLED || state == v1::JOB_STATE_FAILED; }

// States in which an attempt holds devices and its ranks may act.
constexpr bool HasRanks(v1::JobState state) { return state == v1::JOB_STATE_STARTING || state == v1::JOB_STATE_RUNNING || state == v1::JOB_STATE_EXPORTING; }

// "RUNNING"
std::string StateWord(v1::JobState state);

// The owner follows from the code: USER, INFRASTRUCTURE or OPERATOR; a code without one (a plain note) has owner "".
v1::Reason MakeReason(absl::string_view code, absl::string_view message, absl::string_view remedy = "");

// Moves the job and returns the event to store with it. `actor`: user | coordinator | worker NAME. INTERNAL if the table forbids the move:
// nothing is changed then.
absl::StatusOr<v1::Event> MoveJob(v1::JobRecord& record, v1::JobState to, const v1::Reason& reason, absl::string_view actor, absl::Time now);

// An event that moves nothing: a checkpoint, an evaluation, a warning.
v1::Event Note(const v1::JobRecord& record, const v1::Reason& reason, absl::string_view actor, absl::Time now);

// MoveJob to CANCELLING, RECOVERING or FAILED from a state with ranks must give up the attempt: the epoch grows, what the ranks had promised
// is forgotten. In one transaction with the move.
void GiveUpAttempt(v1::JobRecord& record);

}  // namespace ppft::coordinator
