// The life of an attempt: start, failure, the end of its ranks.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "coordinator/core/checkpoints.h"
#include "coordinator/core/job_state.h"
#include "coordinator/core/progress.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {

void JobController::DecideStarts() {
  queue_changed_ = false;
  std::vector<const v1::JobRecord*> queued;
  for (const auto& [id, job] : jobs_) {
    if (job.record.job().status().state() == v1::JOB_STATE_QUEUED) queued.push_back(&job.record);
  }
  if (queued.empty()) return;
  const auto plan = [this](const v1::JobRecord& record, const std::vector<OfferedDevice>& devices, const std::string& kind) {
    const auto model = Model(record.job().spec().model().base_model());
    if (!model.ok()) return PlanAttempt{std::nullopt, 0, std::string(model.status().message())};
    return plan_(record, **model, devices, kind);
  };
  for (QueueDecision& decision : DecideQueue(queued, FreeDevices(), AllDevices(), GpusAway(), plan, now_unix_ms())) {
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
  if (job.failures.empty()) job.failure_deadline = options_.steady() + options_.cause_grace;
  job.failures.Add(failure);
  if (job.failures.settled()) job.failure_deadline = options_.steady();
}

// The attempt is given up for this cause; perhaps the job with it.
void JobController::Fail(JobEntry& job, const Failure& failure) {
  RetryDecision decision = DecideRetry(job.record.retry(), failure, job.record.resume_step(), job.record.job().spec().limits().max_restarts());
  if (decision.restart && !decision.pause && decision.delay > absl::ZeroDuration()) {
    decision.state.set_not_before_unix_ms(now_unix_ms() + absl::ToInt64Milliseconds(decision.delay));
  }
  *job.record.mutable_retry() = decision.state;
  *job.record.mutable_failure() = decision.reason;
  if (!decision.restart) {
    Move(job, v1::JOB_STATE_FAILED, decision.reason);
    return EndAttempt(job);
  }
  GiveUp(job, decision.reason);
  if (!decision.excluded.empty()) {
    AddNote(job, MakeReason("WORKER_EXCLUDED", absl::StrCat("worker ", decision.excluded, " failed this job twice, now with ", decision.reason.code(),
                                                            ": the job keeps away from it while other workers can take it")));
  }
  if (decision.pause) {
    job.work_after = options_.steady() + decision.delay;
  } else {
    v1::JobStatus& status = *job.record.mutable_job()->mutable_status();
    status.set_restarts(status.restarts() + 1);
  }
  after_commit_.push_back([this, id = job.record.job().id(), code = decision.reason.code()] { metrics_->AddJobRestart(id, code); });
  FinishGivingUp(job);
}

void JobController::GiveUp(JobEntry& job, const v1::Reason& reason) {
  const std::string id = job.record.job().id();
  Move(job, v1::JOB_STATE_RECOVERING, reason);
  EndAttempt(job);
  v1::JobStatus& status = *job.record.mutable_job()->mutable_status();
  const v1::CheckpointManifest* newest = job.checkpoints.empty() ? nullptr : &job.checkpoints.back();
  if (const absl::Status deleted = store_->DeleteMetricsAfter(id, newest == nullptr ? -1 : newest->state().step()); !deleted.ok()) return Broken(deleted);
  const auto train = store_->NewestMetric(id, false);
  const auto eval = store_->NewestMetric(id, true);
  if (!train.ok() || !eval.ok()) return Broken(train.ok() ? eval.status() : train.status());
  RewindTo(status, newest, *train, *eval);
  after_commit_.push_back([this, id, step = status.step()] { metrics_->SetJobStep(id, static_cast<double>(step)); });
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
  if (job.trace.has_value()) job.trace.emplace(TraceRun{job.trace->order, {}, {}});  // the next attempt answers anew
  job.failures.Clear();
  job.checks_running = 0;
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
  const v1::Reason failure = job.record.failure();
  const bool pause = failure.code() == "DISK_FULL";
  Move(job, v1::JOB_STATE_QUEUED,
       MakeReason("RESTART", absl::StrCat(pause ? std::string("goes on") : absl::StrCat("restart ", job.record.job().status().restarts()),
                                          step > 0 ? absl::StrCat(" from the checkpoint of step ", step) : std::string(" from the beginning"), " after ",
                                          failure.code())));
  if (pause) Move(job, v1::JOB_STATE_PAUSED, failure);
}

}  // namespace ppft::coordinator
