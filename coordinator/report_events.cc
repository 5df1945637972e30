// What ranks report, and what follows for their job.
#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/format.h"
#include "common/base/logging.h"
#include "coordinator/core/checkpoints.h"
#include "coordinator/core/job_state.h"
#include "coordinator/core/progress.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {
namespace {

const v1::RankPlan* FindRank(const v1::Plan& plan, int32_t rank) {
  for (const v1::RankPlan& candidate : plan.ranks()) {
    if (candidate.rank() == rank) return &candidate;
  }
  return nullptr;
}

std::string StepsDone(int64_t steps) { return absl::StrCat(Counted(steps, "step"), steps == 1 ? " is done" : " are done"); }

}  // namespace

void JobController::OnReport(WorkerEntry& worker, const v1::RankReport& report) {
  if (report.seq() <= worker.acked_seq) {
    worker.ack_due = true;  // it did not hear the acknowledgement
    return;
  }
  if (report.seq() != worker.acked_seq + 1) {
    LogWarning("worker ", worker.shown.name(), ": report ", report.seq(), " follows report ", worker.acked_seq);
  }
  worker.acked_seq = report.seq();
  worker.ack_due = worker.row_changed = true;
  const v1::RankKey& key = report.rank();
  JobEntry* job = FindEntry(key.job_id());
  if (job == nullptr) return;
  if (report.report().has_log()) {  // also of a rank that was given up: its last words are worth the most
    const v1::LogLine& line = report.report().log();
    AddLog(*job, line.source().empty() ? absl::StrCat("rank-", key.rank()) : line.source(), line.severity().empty() ? "INFO" : line.severity(), line.text());
    return;
  }
  if (report.report().has_exited()) {
    const Key gone{key.job_id(), key.epoch(), key.rank()};
    worker.running.erase(gone);
    for (Remnant& remnant : remnants_) {
      if (remnant.key == gone && remnant.worker == worker.shown.name()) remnant.incarnation.clear();  // no agent has this one: it is gone
    }
  }
  const v1::JobStatus& status = job->record.job().status();
  const v1::RankPlan* rank = FindRank(job->record.plan(), key.rank());
  const bool current = HasRanks(status.state()) && key.epoch() == status.attempt_epoch() && rank != nullptr && rank->worker() == worker.shown.name();
  if (current) return OnCurrentReport(*job, worker, report);
  if (key.epoch() != status.attempt_epoch() && !report.report().has_exited()) metrics_->CountStaleEpoch();
}

void JobController::OnCurrentReport(JobEntry& job, const WorkerEntry& worker, const v1::RankReport& report) {
  const v1::RankKey& key = report.rank();
  const v1::TrainerReport& body = report.report();
  const v1::JobStatus& status = job.record.job().status();
  switch (body.report_case()) {
    case v1::TrainerReport::kListening:
    case v1::TrainerReport::kReady: {
      if (const absl::Status put = store_->PutRankReport(key, body.report_case(), 0, body); !put.ok()) return Broken(put);
      const int num_ranks = job.record.plan().ranks_size();
      if (body.has_listening()) {
        job.endpoints[key.rank()] = body.listening().address();
        if (static_cast<int>(job.endpoints.size()) == num_ranks) DirectivesChanged(job);
      } else {
        job.ready.insert(key.rank());
        if (static_cast<int>(job.ready.size()) == num_ranks && status.state() == v1::JOB_STATE_STARTING) {
          Move(job, v1::JOB_STATE_RUNNING, MakeReason("READY", "all ranks are ready"));
        }
      }
      return;
    }
    case v1::TrainerReport::kStep:
      return OnStep(job, body.step());
    case v1::TrainerReport::kEval:
      return OnEval(job, body.eval(), absl::StrCat("worker ", worker.shown.name()));
    case v1::TrainerReport::kCheckpoint:
      return OnCheckpoint(job, report);
    case v1::TrainerReport::kFinished:
      return OnFinished(job, report);
    case v1::TrainerReport::kExported:
      return OnExported(job, report);
    case v1::TrainerReport::kFailure: {
      const Failure failure = FailureOf(body.failure(), key.rank(), status.step());
      if (failure.reason.code() == "CHECKPOINT_CORRUPT" && status.state() == v1::JOB_STATE_STARTING && job.record.resume_step() > 0) {
        return CheckCheckpoint(job, failure);
      }
      return OnFailure(job, failure);
    }
    case v1::TrainerReport::kExited:
      return OnExited(job, worker, report);
    case v1::TrainerReport::kTrace:
      return OnTrace(job, worker, *FindRank(job.record.plan(), key.rank()), body.trace());
    case v1::TrainerReport::kStats:  // the agents serve these figures themselves
    case v1::TrainerReport::kLog:
    case v1::TrainerReport::REPORT_NOT_SET:
      return;
  }
}

void JobController::OnStep(JobEntry& job, const v1::StepReport& report) {
  const std::string id = job.record.job().id();
  if (job.record.job().status().state() == v1::JOB_STATE_STARTING) Move(job, v1::JOB_STATE_RUNNING, MakeReason("READY", "the first step is done"));
  v1::JobStatus& status = *job.record.mutable_job()->mutable_status();
  ApplyStep(status, report);
  job.status_changed = true;
  if (const absl::Status put = store_->PutMetric(id, report.row()); !put.ok()) return Broken(put);
  for (const v1::SkippedStep& skipped : report.skipped()) {
    v1::Event note = Note(job.record, MakeReason("STEP_SKIPPED", SkippedText(skipped)), "coordinator", options_.wall());
    note.set_step(skipped.step());
    Append(job, note);
  }
  after_commit_.push_back([this, id, report, eta = status.eta()] {
    const v1::MetricRow& row = report.row();
    metrics_->SetJobStep(id, static_cast<double>(row.step()));
    if (row.has_loss()) metrics_->SetJobLoss(id, row.loss());
    if (row.has_learning_rate()) metrics_->SetJobLearningRate(id, row.learning_rate());
    if (row.has_grad_norm()) metrics_->SetJobGradNorm(id, row.grad_norm());
    metrics_->SetJobLossScale(id, row.loss_scale());
    metrics_->SetJobTokensPerSecond(id, row.tokens_per_second());
    metrics_->SetJobEtaSeconds(id, static_cast<double>(eta.seconds()) + eta.nanos() * 1e-9);
    metrics_->FollowJobTokens(id, static_cast<double>(report.tokens_seen()), static_cast<double>(report.supervised_tokens()));
    metrics_->FollowJobSkippedSteps(id, static_cast<double>(report.skipped_steps()));
  });
}

void JobController::OnEval(JobEntry& job, const v1::EvalReport& report, const std::string& actor) {
  const std::string id = job.record.job().id();
  if (!report.row().has_eval_loss()) return;
  ApplyEval(*job.record.mutable_job()->mutable_status(), report);
  job.status_changed = true;
  if (const absl::Status put = store_->PutMetric(id, report.row()); !put.ok()) return Broken(put);
  v1::Event note = Note(job.record,
                        MakeReason("EVALUATED", absl::StrCat("evaluation loss ", report.row().eval_loss(), " at step ", report.row().step(),
                                                             report.best() ? ", the best so far" : "")),
                        actor, options_.wall());
  note.set_step(report.row().step());
  Append(job, note);
  after_commit_.push_back([this, id, loss = report.row().eval_loss()] { metrics_->SetJobEvalLoss(id, loss); });
}

void JobController::OnCheckpoint(JobEntry& job, const v1::RankReport& report) {
  const v1::RankKey& key = report.rank();
  const int64_t step = report.report().checkpoint().state().step();
  if (const absl::Status put = store_->PutRankReport(key, v1::TrainerReport::kCheckpoint, step, report.report()); !put.ok()) return Broken(put);
  job.first_written.try_emplace(step, options_.steady());
  const auto rows = store_->ListRankReports(key.job_id(), key.epoch(), v1::TrainerReport::kCheckpoint);
  if (!rows.ok()) return Broken(rows.status());
  std::map<int32_t, v1::CheckpointWritten> written;
  for (const RankReportRow& row : *rows) {
    if (row.step == step) written[row.rank] = row.report.checkpoint();
  }
  std::optional<v1::CheckpointManifest> manifest = JoinCheckpoint(job.record.plan(), written);
  if (manifest.has_value()) CommitCheckpoint(job, *std::move(manifest));
}

void JobController::CommitCheckpoint(JobEntry& job, v1::CheckpointManifest manifest) {
  const std::string id = job.record.job().id();
  const int64_t step = manifest.state().step();
  v1::JobStatus& status = *job.record.mutable_job()->mutable_status();
  const absl::Time now = options_.wall();
  manifest.set_job_id(id);
  manifest.set_epoch(status.attempt_epoch());
  manifest.mutable_create_time()->set_seconds(absl::ToUnixSeconds(now));
  absl::Status stored = store_->PutCheckpoint(manifest);
  if (stored.ok()) stored = store_->DeleteRankReports(id, v1::TrainerReport::kCheckpoint, step);
  if (!stored.ok()) return Broken(stored);
  while (!job.checkpoints.empty() && job.checkpoints.back().state().step() >= step) job.checkpoints.pop_back();
  job.checkpoints.push_back(std::move(manifest));
  status.set_checkpoint_step(step);
  job.record.mutable_retry()->set_restarts_since_checkpoint(0);
  job.disk_pauses = 0;
  job.changed = true;

  std::set<std::string> contents;
  for (const int64_t gone : CheckpointsToDelete(job.checkpoints, job.record.job().spec().checkpoint().save_total_limit(), {job.record.resume_step()})) {
    for (auto it = job.checkpoints.begin(); it != job.checkpoints.end(); ++it) {
      if (it->state().step() != gone) continue;
      for (const v1::FileRef& file : it->files()) contents.insert(file.sha256());
      job.checkpoints.erase(it);
      break;
    }
    if (const absl::Status deleted = store_->DeleteCheckpoint(id, gone); !deleted.ok()) return Broken(deleted);
  }
  DropUnreferenced(contents);
  v1::Event note = Note(job.record, MakeReason("CHECKPOINT", absl::StrCat("checkpoint of step ", step, " committed")), "coordinator", now);
  note.set_step(step);
  Append(job, note);
  const auto first = job.first_written.find(step);
  const absl::Duration took = first == job.first_written.end() ? absl::ZeroDuration() : options_.steady() - first->second;
  job.first_written.erase(job.first_written.begin(), job.first_written.upper_bound(step));
  after_commit_.push_back([this, id, now, took] {
    metrics_->SetCheckpointTime(id, now);
    metrics_->ObserveCheckpointSave(took);
  });
}

void JobController::CheckCheckpoint(JobEntry& job, const Failure& failure) {
  std::map<int64_t, std::vector<std::string>> contents;
  const auto add = [&](int64_t step) {
    for (const v1::CheckpointManifest& one : job.checkpoints) {
      if (one.state().step() != step) continue;
      for (const v1::FileRef& file : one.files()) contents[step].push_back(file.sha256());
    }
  };
  const int64_t resume_step = job.record.resume_step();
  add(resume_step);
  for (const v1::CheckpointManifest& one : job.checkpoints) {
    if (one.state().step() == resume_step && one.state().best_step() > 0 && one.state().best_step() != resume_step) {
      add(one.state().best_step());
      break;
    }
  }
  const std::string id = job.record.job().id();
  const int64_t epoch = job.record.job().status().attempt_epoch();
  ++job.checks_running;
  after_commit_.push_back([this, id, epoch, failure, contents = std::move(contents)] {
    pool_.Run([this, id, epoch, failure, contents] {
      std::map<int64_t, std::string> damage;
      for (const auto& [step, sha256s] : contents) {
        const absl::Status status = work_->CheckBlobs(sha256s);
        if (absl::IsDataLoss(status) || absl::IsNotFound(status)) damage[step] = std::string(status.message());
      }
      Post([this, id, epoch, failure, damage = std::move(damage)](JobStore&) {
        OnCheckpointChecked(id, epoch, failure, damage);
        return absl::OkStatus();
      });
    });
  });
}

void JobController::OnCheckpointChecked(const std::string& id, int64_t epoch, Failure failure, const std::map<int64_t, std::string>& damage) {
  JobEntry* job = FindEntry(id);
  if (job == nullptr || job->record.job().status().attempt_epoch() != epoch) return;
  job->checks_running = std::max(0, job->checks_running - 1);
  const v1::JobState state = job->record.job().status().state();
  if (!HasRanks(state)) return;
  for (const auto& [step, why] : damage) {
    if (state == v1::JOB_STATE_STARTING && MarkDamaged(*job, step, why)) failure.costs_checkpoint = true;
  }
  OnFailure(*job, failure);
}

bool JobController::MarkDamaged(JobEntry& job, int64_t step, const std::string& why) {
  const auto has_step = [](int64_t wanted) { return [wanted](const v1::CheckpointManifest& one) { return one.state().step() == wanted; }; };
  if (std::none_of(job.checkpoints.begin(), job.checkpoints.end(), has_step(step))) return false;  // another rank has said so
  const v1::JobSpec& spec = job.record.job().spec();
  std::map<int64_t, std::string> damage = {{step, why}};
  std::vector<v1::CheckpointManifest> others;
  std::remove_copy_if(job.checkpoints.begin(), job.checkpoints.end(), std::back_inserter(others), has_step(step));
  const v1::CheckpointManifest* newest = NewestUsable(others, spec.checkpoint().load_best_model_at_end() && job.record.prepared().has_eval_tokens());
  const int64_t newest_step = newest == nullptr ? 0 : newest->state().step();
  for (const v1::CheckpointManifest& other : others) {
    if (other.state().step() > newest_step) damage[other.state().step()] = absl::StrCat("it needs the checkpoint of step ", step, ": ", why);
  }
  std::vector<v1::CheckpointManifest> good;
  for (v1::CheckpointManifest& manifest : job.checkpoints) {
    const auto bad = damage.find(manifest.state().step());
    if (bad == damage.end()) {
      good.push_back(std::move(manifest));
      continue;
    }
    manifest.set_damage(bad->second);
    if (const absl::Status put = store_->PutCheckpoint(manifest); !put.ok()) Broken(put);
  }
  job.checkpoints = std::move(good);
  job.record.mutable_job()->mutable_status()->set_checkpoint_step(newest_step);
  job.changed = true;
  const std::string next =
      newest_step > 0 ? absl::StrCat("the job goes back to the one of step ", newest_step) : "no older one is left: the job starts again from the beginning";
  v1::Event note = Note(job.record, MakeReason("CHECKPOINT_CORRUPT", absl::StrCat("the checkpoint of step ", step, " is not used any more; ", next, ": ", why)),
                        "coordinator", options_.wall());
  note.set_step(step);
  Append(job, note);
  return true;
}

// Rows of contents that nothing names any more go now, the files after the commit.
void JobController::DropUnreferenced(const std::set<std::string>& contents) {
  std::vector<std::string> gone;
  for (const std::string& sha256 : contents) {
    const absl::StatusOr<bool> referenced = store_->IsReferenced(sha256);
    if (!referenced.ok()) return Broken(referenced.status());
    if (*referenced) continue;
    if (const absl::Status deleted = store_->DeleteBlob(sha256); !deleted.ok()) return Broken(deleted);
    gone.push_back(sha256);
  }
  if (gone.empty()) return;
  after_commit_.push_back([this, gone] { pool_.Run([this, gone] { work_->DeleteBlobs(gone); }); });
}

void JobController::OnFinished(JobEntry& job, const v1::RankReport& report) {
  const v1::TrainingFinished& finished = report.report().finished();
  if (report.rank().rank() != LossRank(job.record.plan()) || job.record.finished()) return;
  if (job.record.job().status().state() == v1::JOB_STATE_STARTING) Move(job, v1::JOB_STATE_RUNNING, MakeReason("READY", "no step was left to do"));
  v1::JobStatus& status = *job.record.mutable_job()->mutable_status();
  status.set_step(finished.state().step());
  status.set_tokens_seen(finished.state().tokens_seen());
  status.set_supervised_tokens(finished.state().supervised_tokens());
  job.record.set_finished(true);
  const bool early = finished.reason() == "early_stopping";
  Move(job, v1::JOB_STATE_EXPORTING,
       MakeReason(early ? "EARLY_STOPPING" : "TRAINED",
                  absl::StrCat(early ? "stopped early: the evaluation loss did not improve; " : "", StepsDone(finished.state().step()))));
}

void JobController::OnExported(JobEntry& job, const v1::RankReport& report) {
  const v1::RankKey& key = report.rank();
  if (const absl::Status put = store_->PutRankReport(key, v1::TrainerReport::kExported, 0, report.report()); !put.ok()) return Broken(put);
  job.exported.insert(key.rank());
  if (!AllExported(job)) return;
  job.failures.Clear();
  if (job.record.job().status().state() == v1::JOB_STATE_STARTING) Move(job, v1::JOB_STATE_RUNNING, MakeReason("READY", "no step was left to do"));
  if (job.record.job().status().state() == v1::JOB_STATE_RUNNING) {
    Move(job, v1::JOB_STATE_EXPORTING, MakeReason("TRAINED", StepsDone(job.record.job().status().step())));
  }
}

void JobController::OnExited(JobEntry& job, const WorkerEntry& worker, const v1::RankReport& report) {
  const v1::Exited& exited = report.report().exited();
  const int32_t rank = report.rank().rank();
  const v1::RankPlan* plan = FindRank(job.record.plan(), rank);
  const bool done = job.exported.count(rank) > 0 || (plan->replica() > 0 && job.record.finished());
  if (exited.status() == 0 && exited.signal() == 0 && done) return;
  if (!exited.detail().empty()) AddLog(job, absl::StrCat("rank-", rank), "ERROR", exited.detail());
  OnFailure(job, FailureOf(exited, rank, worker.shown.name(), job.record.job().status().step()));
}

}  // namespace ppft::coordinator
