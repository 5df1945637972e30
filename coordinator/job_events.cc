// The life of a job: submit, prepare, start, give up, export, end.
#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/net/status.h"
#include "coordinator/core/checkpoints.h"
#include "coordinator/core/job_state.h"
#include "coordinator/core/progress.h"
#include "coordinator/core/steps.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {
namespace {

constexpr size_t kMaxLogText = 8192;
constexpr int kMaxWorkFailures = 3;
constexpr int kAllRows = 1 << 30;
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
  if (found == nullptr) return absl::NotFoundError(absl::StrCat("no job \"", id_or_name, "\": see `ppctl list`"));
  return found;
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
  PPFT_ASSIGN_OR_RETURN(const absl::optional<std::string> first, store_->FindRequest("SubmitJob", request_id, payload_sha256));
  if (first.has_value()) return jobs_.at(*first).record.job();
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
    PPFT_ASSIGN_OR_RETURN(const absl::optional<std::string> first, store_->FindRequest("CancelJob", request_id, payload_sha256));
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
    if (job.failure.has_value() && options_.steady() >= job.failure_deadline) Fail(job);
    const auto& limits = job.record.job().spec().limits();
    if (status.state() == v1::JOB_STATE_RUNNING && limits.has_max_duration()) {
      const int64_t ms = job.record.running_ms() + now_unix_ms() - job.record.running_since_unix_ms();
      const int64_t limit_ms = limits.max_duration().seconds() * 1000 + limits.max_duration().nanos() / 1000000;
      if (ms > limit_ms) {
        job.failure = Failure{MakeReason("QUOTA_EXCEEDED", absl::StrCat("ran longer than limits.max_duration (", limit_ms / 1000, " s)"),
                                         "raise limits.max_duration and submit again"),
                              status.step()};
        Fail(job);
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

// Work on the pool that a job needs and that is not under way: after a submit, a restart of the coordinator, or a pause after an error.
void JobController::StartWork() {
  for (auto& [id, job] : jobs_) {
    const v1::JobState state = job.record.job().status().state();
    if (job.work_id != 0 || job.work_after > options_.steady()) continue;
    if (state == v1::JOB_STATE_PREPARING && prepares_running_ < options_.max_prepares) StartPrepare(job);
    if (state == v1::JOB_STATE_EXPORTING && AllExported(job)) StartAssemble(job);
  }
}

void JobController::StartPrepare(JobEntry& job) {
  const std::string id = job.record.job().id();
  auto input = std::make_shared<PrepareInput>();
  input->job_id = id;
  input->spec = job.record.job().spec();
  absl::Status status;
  if (const auto model = Model(input->spec.model().base_model()); model.ok()) {
    input->model = **model;
  } else {
    status = model.status();
  }
  for (const auto& [specs, datasets] :
       {std::make_pair(&input->spec.data().datasets(), &input->datasets), std::make_pair(&input->spec.data().test_datasets(), &input->test_datasets)}) {
    for (const v1::DatasetSpec& dataset : *specs) {
      const absl::StatusOr<v1::Dataset> found = store_->GetDataset(dataset.path());
      if (!found.ok()) status = found.status();
      if (found.ok()) datasets->push_back(*found);
    }
  }
  if (absl::IsNotFound(status)) return Move(job, v1::JOB_STATE_FAILED, MakeReason("SPEC_INVALID", status.message(), "submit the job again"));
  if (!status.ok()) return Broken(status);
  job.work_id = next_work_id_++;
  job.work_cancelled = std::make_shared<std::atomic<bool>>(false);
  ++prepares_running_;
  after_commit_.push_back([this, id, input, work_id = job.work_id, cancelled = job.work_cancelled] {
    pool_.Run([this, id, input, work_id, cancelled] {
      auto result = work_->Prepare(*input, [cancelled] { return cancelled->load(); });
      Post([this, id, work_id, result = std::move(result)](JobStore&) {
        OnPrepared(id, work_id, result);
        return absl::OkStatus();
      });
    });
  });
}

void JobController::OnPrepared(const std::string& id, int64_t work_id, const absl::StatusOr<v1::PreparedData>& result) {
  prepares_running_ = std::max(0, prepares_running_ - 1);
  JobEntry* job = FindEntry(id);
  if (job == nullptr || job->work_id != work_id) return;
  job->work_id = 0;
  if (job->record.job().status().state() != v1::JOB_STATE_PREPARING) return;
  if (!result.ok()) {
    if (!RetryWork(*job, result.status())) {
      const bool user = absl::IsInvalidArgument(result.status()) || absl::IsFailedPrecondition(result.status()) || absl::IsNotFound(result.status());
      std::string code = net::GetErrorInfo(result.status()).reason;
      if (code.empty()) code = user ? "DATASET_INVALID" : "INTERNAL";
      AddLog(*job, "prepare", "ERROR", std::string(result.status().message()));
      Move(*job, v1::JOB_STATE_FAILED,
           MakeReason(code, result.status().message(), user ? "repair the data and submit again" : "see the coordinator's log, then submit again"));
    }
    return;
  }
  const v1::TokenStatistics& train = result->train();
  const absl::StatusOr<int64_t> total = TotalSteps(job->record.job().spec(), train);
  if (!total.ok()) return Move(*job, v1::JOB_STATE_FAILED, MakeReason("SPEC_INVALID", total.status().message(), "correct the job file and submit again"));
  *job->record.mutable_prepared() = *result;
  job->record.mutable_job()->mutable_status()->set_total_steps(*total);
  const std::string text = absl::StrCat(train.rows(), " rows, ", train.tokens(), " tokens, ", train.supervised_tokens(), " supervised",
                                        result->has_eval_tokens() ? absl::StrCat("; ", result->eval().rows(), " evaluation rows") : "");
  AddLog(*job, "prepare", "INFO", text);
  Move(*job, v1::JOB_STATE_QUEUED, MakeReason("PREPARED", text));
}

bool JobController::RetryWork(JobEntry& job, const absl::Status& status) {
  if (absl::IsInvalidArgument(status) || absl::IsFailedPrecondition(status) || absl::IsNotFound(status) || absl::IsDataLoss(status)) return false;
  const bool disk_full = absl::IsResourceExhausted(status);
  if (!disk_full && ++job.work_failures >= kMaxWorkFailures) return false;
  job.work_after = options_.steady() + options_.work_retry_delay;
  v1::Reason reason =
      MakeReason(disk_full ? "DISK_FULL" : "INTERNAL", absl::StrCat(status.message(), "; trying again"), disk_full ? "make room on the disk of data_dir" : "");
  if (job.record.job().status().reason().message() != reason.message()) {
    AddNote(job, reason);
    *job.record.mutable_job()->mutable_status()->mutable_reason() = reason;
    job.status_changed = true;
  }
  return true;
}

void JobController::DecideStarts() {
  queue_changed_ = false;
  std::vector<const v1::JobRecord*> queued;
  for (const auto& [id, job] : jobs_) {
    if (job.record.job().status().state() == v1::JOB_STATE_QUEUED) queued.push_back(&job.record);
  }
  if (queued.empty()) return;
  const auto plan = [this](const v1::JobRecord& record, const std::vector<OfferedDevice>& devices) {
    const auto model = Model(record.job().spec().model().base_model());
    if (!model.ok()) return PlanAttempt{absl::nullopt, 0, std::string(model.status().message())};
    return plan_(record, **model, devices);
  };
  for (QueueDecision& decision : DecideQueue(queued, FreeDevices(), AllDevices(), plan, now_unix_ms())) {
    JobEntry& job = jobs_.at(decision.job_id);
    if (decision.plan.has_value()) {
      StartAttempt(job, *decision.plan, decision.reason);
      continue;
    }
    v1::JobStatus& status = *job.record.mutable_job()->mutable_status();
    if (status.queue_position() == decision.position && status.reason().message() == decision.reason.message()) continue;
    status.set_queue_position(decision.position);
    *status.mutable_reason() = decision.reason;
    job.status_changed = true;
  }
}

absl::Status JobController::LoadInitAdapter(JobEntry& job) {
  job.init_adapter.clear();
  const std::string& id = job.record.job().spec().model().init_adapter();
  if (id.empty()) return absl::OkStatus();
  PPFT_ASSIGN_OR_RETURN(const v1::ArtifactManifest manifest, store_->GetArtifact(id, "adapter"));
  for (const char* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    for (const v1::FileRef& file : manifest.files()) {
      if (file.name() == name) job.init_adapter.push_back(file);
    }
  }
  return absl::OkStatus();
}

void JobController::StartAttempt(JobEntry& job, const v1::Plan& plan, const v1::Reason& reason) {
  if (const absl::Status status = LoadInitAdapter(job); !status.ok()) {
    if (!absl::IsNotFound(status)) return Broken(status);
    return Move(job, v1::JOB_STATE_FAILED, MakeReason("ADAPTER_INVALID", status.message(), "submit the job with another init_adapter"));
  }
  *job.record.mutable_plan() = plan;
  job.record.set_resume_step(job.checkpoints.empty() ? 0 : job.checkpoints.back().state().step());
  ShowPlan(*job.record.mutable_job()->mutable_status(), plan);
  const absl::Duration waited = absl::Milliseconds(job.queued_unix_ms > 0 ? now_unix_ms() - job.queued_unix_ms : 0);
  after_commit_.push_back([this, waited] { metrics_->ObserveQueueWait(waited); });
  Move(job, v1::JOB_STATE_STARTING, reason);
  DirectivesChanged(job);
}

bool JobController::AllExported(const JobEntry& job) const {
  const std::vector<int32_t> owners = StateOwners(job.record.plan());
  return !owners.empty() && std::all_of(owners.begin(), owners.end(), [&](int32_t rank) { return job.exported.count(rank) > 0; });
}

void JobController::OnFailure(JobEntry& job, const Failure& failure) {
  if (AllExported(job)) return;  // everything that the ranks had to give is here
  if (job.failure.has_value() && failure.weight <= job.failure->weight) return;
  job.failure = failure;
  job.failure_deadline = options_.steady();
  if (failure.waits_for_cause()) job.failure_deadline += options_.cause_grace;
}

// The attempt is given up for job.failure.
void JobController::Fail(JobEntry& job) {
  Failure failure = *job.failure;
  job.failure.reset();
  if (failure.waits_for_cause()) {
    for (const v1::RankPlan& rank : job.record.plan().ranks()) {
      if (EntryOf(rank.worker()).link != nullptr) continue;
      failure = Failure{MakeReason("WORKER_LOST", absl::StrCat("the connection of worker ", rank.worker(), " broke")), failure.step};
    }
  }
  const v1::JobSpec& spec = job.record.job().spec();
  RetryDecision decision = DecideRetry(job.record.retry(), failure, spec.limits().max_restarts());
  if (decision.restart && decision.delay > absl::ZeroDuration()) {
    decision.state.set_not_before_unix_ms(now_unix_ms() + absl::ToInt64Milliseconds(decision.delay));
  }
  *job.record.mutable_retry() = decision.state;
  *job.record.mutable_failure() = decision.reason;
  const std::string id = job.record.job().id();
  Move(job, decision.restart ? v1::JOB_STATE_RECOVERING : v1::JOB_STATE_FAILED, decision.reason);
  EndAttempt(job);
  if (!decision.restart) return;
  v1::JobStatus& status = *job.record.mutable_job()->mutable_status();
  status.set_restarts(status.restarts() + 1);
  const v1::CheckpointManifest* newest = job.checkpoints.empty() ? nullptr : &job.checkpoints.back();
  if (const absl::Status deleted = store_->DeleteMetricsAfter(id, newest == nullptr ? -1 : newest->state().step()); !deleted.ok()) return Broken(deleted);
  const auto train = store_->NewestMetric(id, false);
  const auto eval = store_->NewestMetric(id, true);
  if (!train.ok() || !eval.ok()) return Broken(train.ok() ? eval.status() : train.status());
  RewindTo(status, newest, *train, *eval);
  after_commit_.push_back([this, id, code = decision.reason.code(), step = status.step()] {
    metrics_->AddJobRestart(id, code);
    metrics_->SetJobStep(id, static_cast<double>(step));
  });
  FinishGivingUp(job);
}

void JobController::DropWork(JobEntry& job) {
  if (job.work_cancelled != nullptr) *job.work_cancelled = true;
  job.work_id = 0;
  job.work_after = absl::InfinitePast();
}

void JobController::EndAttempt(JobEntry& job) {
  const std::string id = job.record.job().id();
  const int64_t epoch = job.record.job().status().attempt_epoch();
  DropWork(job);
  std::set<std::string> contents;
  for (const int kind : {v1::TrainerReport::kCheckpoint, v1::TrainerReport::kExported}) {
    const auto rows = store_->ListRankReports(id, epoch, kind);
    if (!rows.ok()) return Broken(rows.status());
    for (const RankReportRow& row : *rows) {
      for (const auto* files : {&row.report.checkpoint().files(), &row.report.exported().adapter_files(), &row.report.exported().merged_files()}) {
        for (const v1::LocalFile& file : *files) contents.insert(file.content().sha256());
      }
    }
  }
  if (const absl::Status status = store_->DeleteRankReports(id); !status.ok()) return Broken(status);
  DropUnreferenced(contents);
  for (const v1::RankPlan& rank : job.record.plan().ranks()) {
    remnants_.push_back(Remnant{{id, epoch, rank.rank()}, rank.worker(), EntryOf(rank.worker()).shown.incarnation(), rank.device(), 0});
  }
  DirectivesChanged(job);
  GiveUpAttempt(job.record);
  job.endpoints.clear();
  job.ready.clear();
  job.exported.clear();
  job.first_written.clear();
  job.failure.reset();
  job.changed = true;
}

// RECOVERING and CANCELLING end when no rank of an old epoch can act any more.
void JobController::FinishGivingUp(JobEntry& job) {
  const std::string& id = job.record.job().id();
  const v1::JobState state = job.record.job().status().state();
  if (state != v1::JOB_STATE_RECOVERING && state != v1::JOB_STATE_CANCELLING) return;
  for (const Remnant& remnant : remnants_) {
    if (std::get<0>(remnant.key) == id) return;
  }
  if (state == v1::JOB_STATE_CANCELLING) return Move(job, v1::JOB_STATE_CANCELLED, MakeReason("CANCELLED", "cancelled by the user"));
  const int64_t step = job.record.job().status().step();
  Move(job, v1::JOB_STATE_QUEUED,
       MakeReason("RESTART", absl::StrCat("restart ", job.record.job().status().restarts(),
                                          step > 0 ? absl::StrCat(" from the checkpoint of step ", step) : std::string(" from the beginning"), " after ",
                                          job.record.failure().code())));
}

void JobController::StartAssemble(JobEntry& job) {
  const std::string id = job.record.job().id();
  auto input = std::make_shared<AssembleInput>();
  input->job_id = id;
  input->spec = job.record.job().spec();
  input->status = job.record.job().status();
  const auto model = Model(input->spec.model().base_model());
  if (!model.ok()) return Broken(model.status());
  input->model = **model;
  auto metrics = store_->ListMetrics(id, -1, kAllRows);
  if (!metrics.ok()) return Broken(metrics.status());
  input->metrics = *std::move(metrics);
  const auto exported = store_->ListRankReports(id, input->status.attempt_epoch(), v1::TrainerReport::kExported);
  if (!exported.ok()) return Broken(exported.status());
  for (const int32_t rank : StateOwners(job.record.plan())) {
    for (const RankReportRow& row : *exported) {
      if (row.rank == rank) input->exports.push_back(row.report.exported());
    }
  }
  job.work_id = next_work_id_++;
  after_commit_.push_back([this, id, input, work_id = job.work_id] {
    pool_.Run([this, id, input, work_id] {
      auto result = work_->Assemble(*input);
      Post([this, id, work_id, result = std::move(result)](JobStore&) {
        OnAssembled(id, work_id, result);
        return absl::OkStatus();
      });
    });
  });
}

void JobController::OnAssembled(const std::string& id, int64_t work_id, const absl::StatusOr<std::vector<v1::ArtifactManifest>>& result) {
  JobEntry* job = FindEntry(id);
  if (job == nullptr || job->work_id != work_id) return;
  job->work_id = 0;
  if (job->record.job().status().state() != v1::JOB_STATE_EXPORTING) return;
  if (!result.ok()) {
    if (RetryWork(*job, result.status())) return;
    Move(*job, v1::JOB_STATE_FAILED,
         MakeReason(absl::IsDataLoss(result.status()) ? "CHECKPOINT_CORRUPT" : "INTERNAL", result.status().message(),
                    "the newest checkpoint is kept: see the coordinator's log, then submit again"));
    return EndAttempt(*job);
  }
  for (v1::ArtifactManifest manifest : *result) {
    manifest.set_id(id);
    manifest.set_job_id(id);
    if (!manifest.has_create_time()) {
      manifest.mutable_create_time()->set_seconds(now_unix_ms() / 1000);
    }
    if (const absl::Status status = store_->PutArtifact(manifest); !status.ok()) return Broken(status);
  }
  Move(*job, v1::JOB_STATE_SUCCEEDED, MakeReason("FINISHED", absl::StrCat("trained ", job->record.job().status().step(), " steps")));
  EndAttempt(*job);
}

}  // namespace ppft::coordinator
