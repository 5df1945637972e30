// The slow work of a job on the pool: preparing its data, assembling its artifacts.
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/format.h"
#include "common/base/status.h"
#include "common/net/status.h"
#include "coordinator/core/checkpoints.h"
#include "coordinator/core/job_state.h"
#include "coordinator/core/progress.h"
#include "coordinator/core/steps.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {
namespace {

constexpr int kMaxWorkFailures = 3;
constexpr int kAllRows = 1 << 30;

}  // namespace

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
  job->disk_pauses = 0;
  const v1::TokenStatistics& train = result->train();
  const absl::StatusOr<int64_t> total = TotalSteps(job->record.job().spec(), train);
  if (!total.ok()) return Move(*job, v1::JOB_STATE_FAILED, MakeReason("SPEC_INVALID", total.status().message(), "correct the job file and submit again"));
  *job->record.mutable_prepared() = *result;
  job->record.mutable_job()->mutable_status()->set_total_steps(*total);
  const std::string text = absl::StrCat(Counted(train.rows(), "row"), ", ", Counted(train.tokens(), "token"), ", ", train.supervised_tokens(), " supervised",
                                        result->has_eval_tokens() ? absl::StrCat("; ", Counted(result->eval().rows(), "evaluation row")) : "");
  AddLog(*job, "prepare", "INFO", text);
  Move(*job, v1::JOB_STATE_QUEUED, MakeReason("PREPARED", text));
}

bool JobController::RetryWork(JobEntry& job, const absl::Status& status) {
  if (absl::IsInvalidArgument(status) || absl::IsFailedPrecondition(status) || absl::IsNotFound(status) || absl::IsDataLoss(status)) return false;
  if (absl::IsResourceExhausted(status)) {
    PauseForDisk(job, std::string(status.message()), 0);
    return true;
  }
  if (++job.work_failures >= kMaxWorkFailures) return false;
  job.work_after = options_.steady() + options_.work_retry_delay;
  const v1::Reason reason = MakeReason("INTERNAL", absl::StrCat(status.message(), "; trying again"));
  if (job.record.job().status().reason().message() != reason.message()) {
    AddNote(job, reason);
    *job.record.mutable_job()->mutable_status()->mutable_reason() = reason;
    job.status_changed = true;
  }
  return true;
}

void JobController::DropWork(JobEntry& job) {
  if (job.work_cancelled != nullptr) *job.work_cancelled = true;
  job.work_id = 0;
  job.work_after = absl::InfinitePast();
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
  Move(*job, v1::JOB_STATE_SUCCEEDED, FinishedReason(job->record.job().status()));
  EndAttempt(*job);
}

}  // namespace ppft::coordinator
