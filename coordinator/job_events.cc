// Jobs: submit, find, cancel; every move, note and log line; what time alone brings about.
#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/spec/suggest.h"
#include "coordinator/core/job_state.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {
namespace {

constexpr size_t kMaxLogText = 8192;
constexpr size_t kMostNames = 2000;                         // that are compared with one that is not known
constexpr absl::Duration kSeriesLinger = absl::Minutes(5);  // a job's metrics after its end

std::string NewJobId() {
  static constexpr char kLetters[] = "abcdefghijklmnopqrstuvwxyz0123456789";
  std::random_device device;
  std::uniform_int_distribution<int> letter(0, 35);
  std::string id = "job-";
  for (int i = 0; i < 8; ++i) id += kLetters[letter(device)];
  return id;
}

}  // namespace

JobController::JobEntry* JobController::FindEntry(const std::string& id) {
  const auto it = jobs_.find(id);
  return it == jobs_.end() ? nullptr : &it->second;
}

absl::StatusOr<const v1::Job*> JobController::FindJob(const std::string& id_or_name) const {
  if (const auto it = jobs_.find(id_or_name); it != jobs_.end()) return &it->second.record.job();
  const v1::Job* found = nullptr;
  for (const auto& [id, job] : jobs_) {
    if (job.record.job().name() != id_or_name) continue;
    if (found != nullptr) {
      return absl::FailedPreconditionError(absl::StrCat("more than one job is named \"", id_or_name, "\": use an id (", found->id(), ", ", id, ", …)"));
    }
    found = &job.record.job();
  }
  if (found != nullptr) return found;
  std::vector<std::string> names;
  for (const v1::JobRecord* record : NewestJobs()) {
    if (names.size() >= kMostNames) break;
    names.push_back(record->job().id());
    names.push_back(record->job().name());
  }
  return absl::NotFoundError(spec::NotThere("job", id_or_name, names, "ppctl list"));
}

std::vector<const v1::JobRecord*> JobController::NewestJobs() const {
  std::vector<const v1::JobRecord*> records;
  for (const auto& [id, job] : jobs_) records.push_back(&job.record);
  std::sort(records.begin(), records.end(), [](const v1::JobRecord* a, const v1::JobRecord* b) { return a->submit_order() > b->submit_order(); });
  return records;
}

absl::StatusOr<const v1::ModelRecord*> JobController::Model(const std::string& name) {
  const auto it = models_.find(name);
  if (it != models_.end()) return &it->second;
  PPFT_ASSIGN_OR_RETURN(v1::ModelRecord record, store_->GetModel(name));
  return &(models_[name] = std::move(record));
}

absl::StatusOr<v1::Job> JobController::Submit(const v1::JobSpec& spec, const std::string& request_id, const std::string& payload_sha256) {
  PPFT_ASSIGN_OR_RETURN(const std::optional<std::string> first, store_->FindRequest("SubmitJob", request_id, payload_sha256));
  if (first.has_value()) return jobs_.at(*first).record.job();
  if (disk_.full) {
    return absl::ResourceExhaustedError(absl::StrCat("DISK_FULL: the coordinator's disk has ", disk_.free_bytes, " bytes free and takes no job below ",
                                                     disk_.high_bytes, "; free space on the disk of its --data_dir and submit again"));
  }
  v1::JobRecord record;
  v1::Job& job = *record.mutable_job();
  do {
    job.set_id(NewJobId());
  } while (jobs_.count(job.id()) > 0);
  job.set_name(spec.name());
  *job.mutable_spec() = spec;
  job.set_request_id(request_id);
  job.set_seq(1);
  job.mutable_status()->set_state(v1::JOB_STATE_PREPARING);
  job.mutable_status()->set_attempt_epoch(1);
  *job.mutable_status()->mutable_reason() = MakeReason("SUBMITTED", "the data is being checked and tokenized");
  record.set_submit_order(next_submit_order_);
  v1::Event event = Note(record, job.status().reason(), "user", options_.wall());
  event.set_from(v1::JOB_STATE_UNSPECIFIED);
  *job.mutable_create_time() = event.time();
  PPFT_RETURN_IF_ERROR(store_->InsertJob(record));
  PPFT_RETURN_IF_ERROR(store_->PutRequest("SubmitJob", request_id, payload_sha256, job.id()));
  PPFT_RETURN_IF_ERROR(store_->AppendEvent(event).status());
  ++next_submit_order_;
  JobEntry& entry = jobs_[job.id()];
  entry.record = record;
  entry.stored_epoch = 1;
  changed_jobs_.insert(job.id());
  after_commit_.push_back([this, id = job.id()] { metrics_->SetJobState(id, StateWord(v1::JOB_STATE_PREPARING)); });
  return entry.record.job();
}

absl::StatusOr<v1::Job> JobController::Cancel(const std::string& id, const std::string& request_id, const std::string& payload_sha256) {
  if (!request_id.empty()) {
    PPFT_ASSIGN_OR_RETURN(const std::optional<std::string> first, store_->FindRequest("CancelJob", request_id, payload_sha256));
    if (first.has_value()) return jobs_.at(*first).record.job();
  }
  PPFT_ASSIGN_OR_RETURN(const v1::Job* found, FindJob(id));
  JobEntry& job = jobs_.at(found->id());
  const v1::JobState state = found->status().state();
  if (state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED) {
    return absl::FailedPreconditionError(absl::StrCat("job ", found->id(), " has ended already: ", StateWord(state)));
  }
  if (!request_id.empty()) PPFT_RETURN_IF_ERROR(store_->PutRequest("CancelJob", request_id, payload_sha256, found->id()));
  if (state == v1::JOB_STATE_CANCELLED || state == v1::JOB_STATE_CANCELLING) return *found;
  Move(job, v1::JOB_STATE_CANCELLING, MakeReason("CANCELLED", "cancelled by the user"), "user");
  HasRanks(state) ? EndAttempt(job) : DropWork(job);
  FinishGivingUp(job);
  return job.record.job();
}

void JobController::Append(JobEntry& job, const v1::Event& event) {
  if (const absl::Status status = store_->AppendEvent(event).status(); !status.ok()) Broken(status);
  changed_jobs_.insert(job.record.job().id());
}

void JobController::Move(JobEntry& job, v1::JobState to, const v1::Reason& reason, const std::string& actor) {
  const v1::JobState from = job.record.job().status().state();
  const absl::StatusOr<v1::Event> event = MoveJob(job.record, to, reason, actor, options_.wall());
  if (!event.ok()) return Broken(event.status());
  Append(job, *event);
  job.changed = true;
  queue_changed_ = true;
  if (to == v1::JOB_STATE_QUEUED) job.queued_unix_ms = now_unix_ms();
  const std::string id = job.record.job().id();
  if (IsTerminal(to)) job.drop_series_at = options_.steady() + kSeriesLinger;
  LogInfo(id, ": ", StateWord(from), " -> ", StateWord(to), " (", reason.code(), reason.message().empty() ? "" : ": ", reason.message(), ")");
  after_commit_.push_back([this, id, to] { metrics_->SetJobState(id, StateWord(to)); });
}

void JobController::AddNote(JobEntry& job, const v1::Reason& reason, const std::string& actor) {
  Append(job, Note(job.record, reason, actor, options_.wall()));
}

void JobController::AddLog(JobEntry& job, const std::string& source, const std::string& severity, const std::string& text) {
  v1::LogLine line;
  const int64_t now = now_unix_ms();
  line.mutable_time()->set_seconds(now / 1000);
  line.mutable_time()->set_nanos(static_cast<int32_t>(now % 1000 * 1000000));
  line.set_source(source);
  line.set_severity(severity);
  line.set_text(text.substr(0, kMaxLogText));
  if (const absl::Status status = store_->AppendLog(job.record.job().id(), line).status(); !status.ok()) Broken(status);
  changed_jobs_.insert(job.record.job().id());
}

// What time alone brings about.
void JobController::TickJobs() {
  int queued = 0;
  for (auto& [id, job] : jobs_) {
    const v1::JobStatus& status = job.record.job().status();
    if (IsTerminal(status.state())) {
      if (job.drop_series_at < options_.steady()) {
        metrics_->DropJob(id);
        job.drop_series_at = absl::InfiniteFuture();
      }
      continue;
    }
    if (!job.failures.empty() && job.checks_running == 0 && options_.steady() >= job.failure_deadline) {
      Fail(job, job.failures.Cause(job.record.plan(), Unreachable(job.record.plan())));
    }
    const auto& limits = job.record.job().spec().limits();
    if (status.state() == v1::JOB_STATE_RUNNING && limits.has_max_duration()) {
      const int64_t ms = job.record.running_ms() + now_unix_ms() - job.record.running_since_unix_ms();
      const int64_t limit_ms = limits.max_duration().seconds() * 1000 + limits.max_duration().nanos() / 1000000;
      if (ms > limit_ms) {
        Fail(job, Failure{MakeReason("QUOTA_EXCEEDED", absl::StrCat("ran longer than limits.max_duration (", limit_ms / 1000, " s)"),
                                     "raise limits.max_duration and submit again"),
                          status.step()});
      }
    }
    if (status.state() == v1::JOB_STATE_QUEUED) {
      ++queued;
      const int64_t not_before = job.record.retry().not_before_unix_ms();
      if (not_before > 0 && not_before <= now_unix_ms()) {
        job.record.mutable_retry()->set_not_before_unix_ms(0);
        job.changed = true;
        queue_changed_ = true;
      }
    }
  }
  metrics_->SetQueueDepth(queued);
}

}  // namespace ppft::coordinator
