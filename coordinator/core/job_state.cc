#include "coordinator/core/job_state.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace ppft::coordinator {
namespace {

constexpr absl::string_view kUserCodes[] = {"SPEC_INVALID",       "DATASET_INVALID", "MODEL_INVALID",  "TOKENIZER_MISMATCH", "OUT_OF_DEVICE_MEMORY",
                                            "NUMERIC_DIVERGENCE", "POISON_STEP",     "QUOTA_EXCEEDED", "CANCELLED",          "ADAPTER_INVALID"};
constexpr absl::string_view kOperatorCodes[] = {"DISK_FULL", "STORE_UNREADABLE", "CERT_EXPIRED", "VERSION_MISMATCH", "NO_CAPACITY"};
constexpr absl::string_view kInfrastructureCodes[] = {"WORKER_LOST",        "WORKER_CRASHED", "STAGE_HUNG",  "COMM_ERROR", "EXPORT_MISMATCH",
                                                      "CHECKPOINT_CORRUPT", "DEVICE_ERROR",   "STALE_EPOCH", "INTERNAL"};

template <typename Codes>
bool Has(const Codes& codes, absl::string_view code) {
  return std::find(std::begin(codes), std::end(codes), code) != std::end(codes);
}

void SetTime(google::protobuf::Timestamp* stamp, absl::Time time) {
  const int64_t nanos = absl::ToUnixNanos(time);
  stamp->set_seconds(nanos / 1000000000);
  stamp->set_nanos(static_cast<int32_t>(nanos % 1000000000));
}

}  // namespace

std::string StateWord(v1::JobState state) { return std::string(absl::StripPrefix(v1::JobState_Name(state), "JOB_STATE_")); }

v1::Reason MakeReason(absl::string_view code, absl::string_view message, absl::string_view remedy) {
  v1::Reason reason;
  reason.set_code(std::string(code));
  if (Has(kUserCodes, code)) reason.set_owner("USER");
  if (Has(kOperatorCodes, code)) reason.set_owner("OPERATOR");
  if (Has(kInfrastructureCodes, code)) reason.set_owner("INFRASTRUCTURE");
  reason.set_message(std::string(message));
  reason.set_remedy(std::string(remedy));
  return reason;
}

v1::Event Note(const v1::JobRecord& record, const v1::Reason& reason, absl::string_view actor, absl::Time now) {
  v1::Event event;
  event.set_job_id(record.job().id());
  SetTime(event.mutable_time(), now);
  event.set_from(record.job().status().state());
  event.set_to(record.job().status().state());
  event.set_actor(std::string(actor));
  *event.mutable_reason() = reason;
  event.set_step(record.job().status().step());
  event.set_attempt_epoch(record.job().status().attempt_epoch());
  return event;
}

absl::StatusOr<v1::Event> MoveJob(v1::JobRecord& record, v1::JobState to, const v1::Reason& reason, absl::string_view actor, absl::Time now) {
  v1::Job& job = *record.mutable_job();
  v1::JobStatus& status = *job.mutable_status();
  const v1::JobState from = status.state();
  if (!IsLegalMove(from, to)) {
    return absl::InternalError(absl::StrCat("job ", job.id(), " cannot move from ", StateWord(from), " to ", StateWord(to)));
  }
  if (from == v1::JOB_STATE_RUNNING) {
    record.set_running_ms(record.running_ms() + std::max<int64_t>(0, absl::ToUnixMillis(now) - record.running_since_unix_ms()));
    record.set_running_since_unix_ms(0);
  }
  if (to == v1::JOB_STATE_RUNNING) {
    record.set_running_since_unix_ms(absl::ToUnixMillis(now));
    if (!job.has_start_time()) SetTime(job.mutable_start_time(), now);
  }
  if (IsTerminal(to)) SetTime(job.mutable_end_time(), now);
  if (to != v1::JOB_STATE_RUNNING) {
    status.clear_eta();
    status.set_tokens_per_second(0);
  }
  status.set_queue_position(0);
  status.set_state(to);
  *status.mutable_reason() = reason;
  v1::Event event = Note(record, reason, actor, now);
  event.set_from(from);
  return event;
}

void GiveUpAttempt(v1::JobRecord& record) {
  v1::JobStatus& status = *record.mutable_job()->mutable_status();
  status.set_attempt_epoch(status.attempt_epoch() + 1);
  record.clear_resume_step();
  record.clear_finished();
}

}  // namespace ppft::coordinator
