#include "coordinator/core/retry.h"

#include <algorithm>
#include <csignal>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/format.h"
#include "coordinator/core/job_state.h"

namespace ppft::coordinator {
namespace {

constexpr int kPoisonFailures = 3;
constexpr absl::Duration kFirstDelay = absl::Milliseconds(500);
constexpr absl::Duration kLongestDelay = absl::Seconds(30);
constexpr absl::Duration kDiskDelay = absl::Seconds(15);
constexpr int kExcludingFailures = 2;
// A model that differs from its files again is no accident of memory or disk.
constexpr int kExportMismatches = 2;

// The last line of a process that said something at its end; "" where that is a line of its log about ordinary work ("2026-11-23T13:31:04.918Z I trainer: …").
std::string LastWords(absl::string_view text) {
  constexpr size_t kSeverity = 24;  // behind the time
  text = absl::StripTrailingAsciiWhitespace(text);
  const size_t newline = text.rfind('\n');
  const absl::string_view line = newline == absl::string_view::npos ? text : text.substr(newline + 1);
  const bool ordinary = line.size() > kSeverity && line[kSeverity - 1] == 'Z' && absl::StartsWith(line.substr(kSeverity), " I ");
  return ordinary ? "" : std::string(line);
}

}  // namespace

Failure FailureOf(const v1::Failure& report, int32_t rank, int64_t status_step) {
  Failure failure{report.reason(), std::max(report.step(), status_step), false};
  failure.rank = rank;
  if (failure.reason.code().empty()) failure.reason.set_code("INTERNAL");
  if (failure.reason.owner().empty()) failure.reason.set_owner(MakeReason(failure.reason.code(), "").owner());
  if (failure.reason.owner().empty()) failure.reason.set_owner("INFRASTRUCTURE");
  const std::string& code = failure.reason.code();
  failure.deterministic = code != "COMM_ERROR" && code != "WORKER_LOST" && code != "STAGE_HUNG" && code != "DISK_FULL" && code != "STALE_EPOCH" &&
                          code != "CHECKPOINT_CORRUPT" && code != "STORE_UNREADABLE" &&
                          code != "OUT_OF_DEVICE_MEMORY";  // that is no user's comes from other processes on the device
  if (code == "COMM_ERROR") failure.peer = report.peer();
  const bool link = code == "COMM_ERROR" && report.peer() != rank;  // its own rank: the agent saw this process stand still
  failure.weight = failure.reason.owner() == "USER" ? Failure::Weight::kUserError : link ? Failure::Weight::kBrokenLink : Failure::Weight::kCause;
  return failure;
}

Failure FailureOf(const v1::Exited& report, int32_t rank, const std::string& worker, int64_t status_step) {
  const std::string who = absl::StrCat("the trainer of rank ", rank, " on ", worker);
  std::string how = report.signal() != 0 ? absl::StrCat(" was ended by signal ", report.signal(), " (", strsignal(report.signal()), ")")
                                         : absl::StrCat(" exited with status ", report.status(), " without a reason");
  if (const std::string last = LastWords(report.detail()); !last.empty()) absl::StrAppend(&how, ": ", last);
  Failure failure{MakeReason("WORKER_CRASHED", absl::StrCat(who, how)), status_step, true};
  failure.rank = rank;
  failure.worker = worker;
  failure.exit = true;
  for (const int kill : {SIGKILL, SIGTERM, SIGINT, SIGHUP, SIGPIPE}) {
    if (report.signal() == kill) failure.deterministic = false;
  }
  if (report.signal() == 0) failure.weight = Failure::Weight::kUnexplainedExit;
  return failure;
}

RetryDecision DecideRetry(const v1::RetryState& state, const Failure& failure, int64_t resume_step, int max_restarts) {
  RetryDecision decision;
  decision.reason = failure.reason;
  decision.state = state;
  const bool same = failure.deterministic && state.last_code() == failure.reason.code() && state.last_step() == failure.step;
  decision.state.set_last_code(failure.deterministic ? failure.reason.code() : "");
  // Where the steps since the last restart that counted began. Such a restart keeps the step of its failure, and the attempt after it begins at or before that.
  const int64_t begin = std::min(state.last_step(), resume_step);
  decision.state.set_last_step(begin);
  decision.state.set_same_failures_in_a_row(!failure.deterministic ? 0 : same ? state.same_failures_in_a_row() + 1 : 1);
  decision.state.set_not_before_unix_ms(0);
  if (failure.reason.owner() == "USER") return decision;
  if (failure.costs_checkpoint) {
    decision.restart = true;
    return decision;
  }
  if (!failure.worker.empty() && failure.reason.owner() != "OPERATOR") {
    int32_t& count = (*decision.state.mutable_failures_by_worker())[failure.worker];
    if (++count == kExcludingFailures) decision.excluded = failure.worker;
  }
  if (failure.reason.code() == "DISK_FULL") {
    decision.restart = decision.pause = true;
    decision.delay = kDiskDelay;
    return decision;
  }
  if (failure.reason.code() == "EXPORT_MISMATCH" && decision.state.same_failures_in_a_row() >= kExportMismatches) return decision;
  if (decision.state.same_failures_in_a_row() >= kPoisonFailures) {
    decision.reason =
        MakeReason("POISON_STEP", absl::StrCat("the step after ", failure.step, " failed ", kPoisonFailures, " times in a row: ", failure.reason.message()),
                   "look at the job's log; the cause lies in the job's data or settings, another attempt would fail again");
    return decision;
  }
  const bool good = failure.step - begin >= kGoodSteps;
  const int restarts = (good ? 0 : state.restarts()) + 1;
  if (restarts > max_restarts) {
    decision.reason.set_message(
        absl::StrCat(failure.reason.message(), " (after ", Counted(max_restarts, "restart"), " without ", kGoodSteps, " good steps in between)"));
    decision.reason.set_remedy("repair the cause, then submit again; limits.max_restarts sets how often a job restarts by itself");
    return decision;
  }
  decision.restart = true;
  decision.state.set_last_step(failure.step);
  decision.state.set_restarts(restarts);
  const int in_a_row = state.restarts_since_checkpoint() + 1;
  decision.state.set_restarts_since_checkpoint(in_a_row);
  if (in_a_row >= 2) decision.delay = std::min(kLongestDelay, kFirstDelay * (int64_t{1} << std::min(in_a_row - 2, 10)));
  return decision;
}

std::vector<std::string> ExcludedWorkers(const v1::RetryState& state) {
  std::vector<std::string> workers;
  for (const auto& [worker, count] : state.failures_by_worker()) {
    if (count >= kExcludingFailures) workers.push_back(worker);
  }
  std::sort(workers.begin(), workers.end());
  return workers;
}

}  // namespace ppft::coordinator
