// Traces: what a job's ranks are told to record, and what they recorded. Nothing of it is stored; the end of the caller's stream ends it.
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/job_state.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {
namespace {

constexpr int kMaxTraceSteps = 100;

bool HasStepsLeft(v1::JobState state) { return !IsTerminal(state) && state != v1::JOB_STATE_EXPORTING && state != v1::JOB_STATE_CANCELLING; }

}  // namespace

absl::StatusOr<int64_t> JobController::BeginTrace(const std::string& id, int num_steps) {
  JobEntry* job = FindEntry(id);
  if (job == nullptr) return absl::NotFoundError(absl::StrCat("no job ", id));
  if (num_steps < 1 || num_steps > kMaxTraceSteps) {
    return absl::InvalidArgumentError(absl::StrCat("num_steps (", num_steps, ") must be 1 to ", kMaxTraceSteps));
  }
  const v1::JobState state = job->record.job().status().state();
  if (!HasStepsLeft(state)) return absl::FailedPreconditionError(absl::StrCat(id, " is ", StateWord(state), ": it has no step left to trace"));
  if (job->trace.has_value()) return absl::FailedPreconditionError(absl::StrCat("another trace of ", id, " is under way: wait for its end"));
  job->trace.emplace();
  job->trace->order.set_id(next_trace_id_++);
  job->trace->order.set_num_steps(num_steps);
  if (HasRanks(state)) DirectivesChanged(*job);
  Controller::Post([](JobStore&) { return absl::OkStatus(); });  // directives go out after a batch
  return job->trace->order.id();
}

void JobController::EndTrace(const std::string& id, int64_t trace) {
  JobEntry* job = FindEntry(id);
  if (job == nullptr || !job->trace.has_value() || job->trace->order.id() != trace) return;
  job->trace.reset();
  if (HasRanks(job->record.job().status().state())) DirectivesChanged(*job);
}

absl::StatusOr<bool> JobController::TakeTrace(const std::string& id, int64_t trace, std::deque<v1::TraceJobResponse>* out) {
  JobEntry* job = FindEntry(id);
  if (job == nullptr || !job->trace.has_value() || job->trace->order.id() != trace) return absl::AbortedError("the coordinator has lost the trace: ask again");
  TraceRun& run = *job->trace;
  if (!run.done.empty() && static_cast<int>(run.done.size()) == job->record.plan().ranks_size()) {
    *out = std::exchange(run.parts, {});
    return true;
  }
  const v1::JobState state = job->record.job().status().state();
  if (IsTerminal(state)) return absl::FailedPreconditionError(absl::StrCat(id, " is ", StateWord(state), ": it ended before its steps could be traced"));
  return false;
}

void JobController::OnTrace(JobEntry& job, const WorkerEntry& worker, const v1::RankPlan& rank, const v1::RankTrace& trace) {
  if (!job.trace.has_value() || job.trace->order.id() != trace.id()) return;
  v1::TraceJobResponse& part = job.trace->parts.emplace_back();
  *part.mutable_rank() = rank;
  part.mutable_rank()->clear_program();
  *part.mutable_trace() = trace;
  if (worker.shown.has_clock()) *part.mutable_clock() = worker.shown.clock();
  if (trace.last()) job.trace->done.insert(rank.rank());
  changed_jobs_.insert(job.record.job().id());
}

}  // namespace ppft::coordinator
