// A full disk: who pauses, and when they go on.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "coordinator/core/job_state.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {
namespace {

constexpr int kMaxDoublings = 6;
constexpr char kCode[] = "DISK_FULL";
constexpr char kRemedy[] = "free space on the disk of the coordinator's --data_dir; nothing else is needed";

std::string Mebibytes(int64_t bytes) { return absl::StrCat((bytes + (1 << 20) - 1) >> 20, " MiB"); }

}  // namespace

void JobController::ReportDiskFull(const v1::RankKey& rank, int64_t needed_bytes, const std::string& message) {
  Post([this, rank, needed_bytes, message](JobStore&) -> absl::Status {
    JobEntry* job = FindEntry(rank.job_id());
    if (job == nullptr) return absl::OkStatus();
    const v1::JobStatus& status = job->record.job().status();
    if (HasRanks(status.state()) && status.attempt_epoch() == rank.epoch()) PauseForDisk(*job, message, needed_bytes);
    return absl::OkStatus();
  });
}

void JobController::PauseForDisk(JobEntry& job, const std::string& what, int64_t needed_bytes) {
  const v1::JobState state = job.record.job().status().state();
  const int64_t needed = std::max(needed_bytes, disk_.high_bytes);
  const v1::Reason reason = MakeReason(kCode, absl::StrCat(what, "; the job goes on by itself when ", Mebibytes(needed), " are free"), kRemedy);
  // Room that is there and still not enough is tried less and less often.
  const absl::Time after = options_.steady() + options_.work_retry_delay * (1 << std::min(job.disk_pauses++, kMaxDoublings));
  job.record.set_disk_needed_bytes(needed);
  job.changed = true;
  if (HasRanks(state)) {
    *job.record.mutable_failure() = reason;
    GiveUp(job, reason);
    job.work_after = after;
    return FinishGivingUp(job);
  }
  DropWork(job);
  job.work_after = after;
  Move(job, v1::JOB_STATE_PAUSED, reason);
}

// At the end of each batch: what has changed on the disk since the last one.
void JobController::TickDisk() {
  disk_ = work_->LookAtDisk();
  for (auto& [id, job] : jobs_) {
    const v1::JobStatus& status = job.record.job().status();
    const v1::JobState state = status.state();
    if (disk_.full) {
      const bool waits = state == v1::JOB_STATE_QUEUED || (state == v1::JOB_STATE_PREPARING && job.work_id == 0);
      if (waits || (disk_.critical && HasRanks(state))) {
        PauseForDisk(job, absl::StrCat("the coordinator's disk is full: ", Mebibytes(disk_.free_bytes), " free"), 0);
      }
    } else if (state == v1::JOB_STATE_PAUSED && status.reason().code() == kCode) {
      if (disk_.free_bytes < job.record.disk_needed_bytes() || options_.steady() < job.work_after) continue;
      job.record.clear_disk_needed_bytes();
      job.work_after = absl::InfinitePast();
      job.changed = true;
      Move(job, job.record.has_prepared() ? v1::JOB_STATE_QUEUED : v1::JOB_STATE_PREPARING,
           MakeReason("RESUMED", absl::StrCat("tries again: ", Mebibytes(disk_.free_bytes), " are free on the coordinator's disk")));
    }
  }
}

}  // namespace ppft::coordinator
