#include "coordinator/job_controller.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "coordinator/core/checkpoints.h"
#include "coordinator/core/job_state.h"

namespace ppft::coordinator {
namespace {

constexpr size_t kMaxBatch = 1000;
constexpr size_t kPoolThreads = 32;

absl::Time SteadyNow() {
  return absl::UnixEpoch() + absl::FromChrono(std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()));
}

ControllerOptions WithDefaults(ControllerOptions options) {
  if (!options.wall) options.wall = [] { return absl::Now(); };
  if (!options.steady) options.steady = SteadyNow;
  return options;
}

}  // namespace

JobController::JobController(std::unique_ptr<JobStore> store, JobWork* work, metrics::CoordinatorMetrics* metrics, ModelPlanFunction plan,
                             ControllerOptions options)
    : store_(std::move(store)), work_(work), metrics_(metrics), plan_(std::move(plan)), options_(WithDefaults(std::move(options))), pool_(kPoolThreads) {}

JobController::~JobController() { Stop(); }

absl::Status JobController::Start() {
  PPFT_RETURN_IF_ERROR(Load());
  thread_ = std::thread([this] { Loop(); });
  return absl::OkStatus();
}

void JobController::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    wake_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  for (auto& [id, job] : jobs_) {
    if (job.work_cancelled != nullptr) *job.work_cancelled = true;
  }
  pool_.Stop();
}

void JobController::Post(Body body, Done done) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!stopping_) {
      tasks_.push_back(Task{std::move(body), std::move(done)});
      wake_.notify_one();
      return;
    }
  }
  done(absl::UnavailableError("the coordinator is stopping"));
}

absl::Status JobController::CheckEpoch(const v1::RankKey& rank) {
  return Run([this, rank](JobStore&) -> absl::Status {
    const JobEntry* job = FindEntry(rank.job_id());
    if (job == nullptr) return absl::NotFoundError(absl::StrCat("no job ", rank.job_id()));
    const v1::JobStatus& status = job->record.job().status();
    if (HasRanks(status.state()) && status.attempt_epoch() == rank.epoch()) return absl::OkStatus();
    metrics_->CountStaleEpoch();
    return absl::FailedPreconditionError(absl::StrCat("STALE_EPOCH: job ", rank.job_id(), " is ", StateWord(status.state()), " at epoch ",
                                                      status.attempt_epoch(), ", the call is of epoch ", rank.epoch()));
  });
}

absl::Duration JobController::NextWake() const {
  for (const auto& [id, job] : jobs_) {
    const v1::JobState state = job.record.job().status().state();
    if (!job.failures.empty() || (state == v1::JOB_STATE_QUEUED && job.record.retry().not_before_unix_ms() > 0)) return absl::Milliseconds(50);
  }
  return std::min(absl::Seconds(1), options_.lease / 4);
}

void JobController::Loop() {
  while (true) {
    std::deque<Task> batch;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait_for(lock, absl::ToChronoNanoseconds(NextWake()), [this] { return stopping_ || !tasks_.empty(); });
      if (stopping_ && tasks_.empty()) return;
      while (!tasks_.empty() && batch.size() < kMaxBatch) {
        batch.push_back(std::move(tasks_.front()));
        tasks_.pop_front();
      }
    }
    if (!loaded_) Reload(absl::UnavailableError("the store could not be read"));
    RunBatch(std::move(batch));
  }
}

// One transaction: all bodies, then the decisions that follow from them.
void JobController::RunBatch(std::deque<Task> tasks) {
  std::vector<absl::Status> results(tasks.size(), absl::OkStatus());
  absl::Status status = loaded_ ? store_->Begin() : absl::UnavailableError("STORE_UNREADABLE: the coordinator cannot read its store; see its log");
  if (status.ok()) {
    batch_status_ = absl::OkStatus();
    status = RunBodies(tasks, results);
    if (status.ok()) status = EndOfBatch();
    if (status.ok()) {
      const absl::Time begin = options_.steady();
      status = store_->Commit();
      metrics_->ObserveStoreCommit(options_.steady() - begin);
    }
    if (status.ok()) {
      AfterCommit();
    } else {
      store_->Rollback();
      if (absl::IsResourceExhausted(status)) {
        work_->GiveUpBallast();
        status = absl::ResourceExhaustedError(
            absl::StrCat("DISK_FULL: the coordinator could not store this (", status.message(), "); free space on the disk of its --data_dir and try again"));
      }
      Reload(status);
    }
  }
  for (size_t i = 0; i < tasks.size(); ++i) tasks[i].done(status.ok() ? results[i] : status);
}

absl::Status JobController::RunBodies(std::deque<Task>& tasks, std::vector<absl::Status>& results) {
  for (size_t i = 0; i < tasks.size(); ++i) {
    PPFT_RETURN_IF_ERROR(store_->Savepoint());
    results[i] = tasks[i].body(*store_);
    PPFT_RETURN_IF_ERROR(results[i].ok() ? store_->Release() : store_->RollbackTo());
    PPFT_RETURN_IF_ERROR(batch_status_);
  }
  return absl::OkStatus();
}

absl::Status JobController::EndOfBatch() {
  TickWorkers();
  TickDisk();
  TickJobs();
  SweepRemnants();
  StartWork();
  if (queue_changed_ && !disk_.full) DecideStarts();
  PPFT_RETURN_IF_ERROR(batch_status_);
  PPFT_RETURN_IF_ERROR(FlushJobs());
  return FlushWorkers();
}

absl::Status JobController::FlushJobs() {
  for (auto& [id, job] : jobs_) {
    if (!job.changed && !job.status_changed) continue;
    job.record.mutable_job()->set_seq(job.record.job().seq() + 1);
    if (job.changed) {
      PPFT_RETURN_IF_ERROR(store_->UpdateJob(job.record, job.stored_epoch));
    } else {
      PPFT_RETURN_IF_ERROR(store_->UpdateJobStatus(job.record.job(), job.stored_epoch));
    }
    job.stored_epoch = job.record.job().status().attempt_epoch();
    job.changed = job.status_changed = false;
    changed_jobs_.insert(id);
  }
  return absl::OkStatus();
}

absl::Status JobController::FlushWorkers() {
  for (auto& [name, worker] : workers_) {
    if (!worker.row_changed) continue;
    PPFT_RETURN_IF_ERROR(store_->PutWorker(WorkerRow{name, worker.shown.incarnation(), worker.acked_seq, worker.num_gpus, worker.gpus_away_unix_ms}));
    worker.row_changed = false;
  }
  return absl::OkStatus();
}

void JobController::AfterCommit() {
  std::vector<std::function<void()>> actions;
  actions.swap(after_commit_);
  for (const auto& action : actions) action();
  for (auto& [name, worker] : workers_) {
    if (!worker.ack_due) continue;
    worker.ack_due = false;
    if (worker.link == nullptr) continue;
    v1::CoordinatorMessage message;
    message.mutable_ack()->set_seq(worker.acked_seq);
    worker.link->Send(std::move(message));
  }
  SendDirectives();
  std::set<std::string> changed;
  changed.swap(changed_jobs_);
  std::vector<std::function<void()>> watchers;
  for (const auto& [number, subscription] : subscriptions_) {
    if (changed.count(subscription.first) > 0) watchers.push_back(subscription.second);
  }
  for (const auto& watcher : watchers) watcher();
}

int64_t JobController::Subscribe(const std::string& job_id, std::function<void()> changed) {
  subscriptions_[next_subscription_] = {job_id, std::move(changed)};
  return next_subscription_++;
}

void JobController::Unsubscribe(int64_t subscription) { subscriptions_.erase(subscription); }

// Back to what is committed. Work under way is forgotten: it begins again, and a late result is not taken.
void JobController::Reload(const absl::Status& why) {
  LogError("the store did not commit: ", why.ToString(), "; loading the committed state again");
  for (auto& [name, worker] : workers_) {
    if (worker.link != nullptr) worker.link->Close(absl::UnavailableError("the coordinator's store did not commit: connect again"));
  }
  for (auto& [id, job] : jobs_) {
    if (job.work_cancelled != nullptr) *job.work_cancelled = true;
  }
  if (const absl::Status status = Load(); !status.ok()) LogError("the store cannot be read: ", status.ToString());
}

absl::Status JobController::Load() {
  loaded_ = false;
  jobs_.clear();
  workers_.clear();
  models_.clear();
  remnants_.clear();
  after_commit_.clear();
  changed_jobs_.clear();
  batch_status_ = absl::OkStatus();
  queue_changed_ = true;
  // Once a process: what is loaded again goes on from the numbers in memory, also where a full disk takes no write.
  if (!numbered_) {
    PPFT_ASSIGN_OR_RETURN(const int64_t start, store_->NextStart());
    next_revision_ = (start << 32) + 1;
    next_trace_id_ = (start << 20) + 1;  // trainers pass it around as a double
    numbered_ = true;
  }
  PPFT_ASSIGN_OR_RETURN(const std::vector<WorkerRow> workers, store_->LoadWorkers());
  for (const WorkerRow& row : workers) {
    WorkerEntry& worker = EntryOf(row.name);
    worker.shown.set_incarnation(row.incarnation);
    worker.acked_seq = row.acked_seq;
    worker.num_gpus = row.num_gpus;
    worker.gpus_away_unix_ms = row.gpus_away_unix_ms;
  }
  PPFT_ASSIGN_OR_RETURN(std::vector<v1::JobRecord> records, store_->LoadJobs());
  for (v1::JobRecord& record : records) PPFT_RETURN_IF_ERROR(LoadJob(std::move(record)));
  loaded_ = true;
  return absl::OkStatus();
}

absl::Status JobController::LoadJob(v1::JobRecord record) {
  const std::string id = record.job().id();
  const v1::JobState state = record.job().status().state();
  const int64_t epoch = record.job().status().attempt_epoch();
  JobEntry& job = jobs_[id];
  next_submit_order_ = std::max(next_submit_order_, record.submit_order() + 1);
  job.record = std::move(record);
  job.stored_epoch = epoch;
  if (IsTerminal(state)) return absl::OkStatus();
  metrics_->SetJobState(id, StateWord(state));
  PPFT_ASSIGN_OR_RETURN(std::vector<v1::CheckpointManifest> checkpoints, store_->ListCheckpoints(id));
  for (v1::CheckpointManifest& checkpoint : checkpoints) {
    if (checkpoint.damage().empty()) job.checkpoints.push_back(std::move(checkpoint));
  }
  if (state == v1::JOB_STATE_RECOVERING || state == v1::JOB_STATE_CANCELLING) {
    for (const v1::RankPlan& rank : job.record.plan().ranks()) {
      remnants_.push_back(Remnant{{id, epoch - 1, rank.rank()}, rank.worker(), EntryOf(rank.worker()).shown.incarnation(), rank.device(), 0});
    }
  }
  if (!HasRanks(state)) return absl::OkStatus();
  for (const v1::RankPlan& rank : job.record.plan().ranks()) EntryOf(rank.worker());  // its lease counts from now
  PPFT_RETURN_IF_ERROR(LoadInitAdapter(job));
  PPFT_ASSIGN_OR_RETURN(const std::vector<RankReportRow> listening, store_->ListRankReports(id, epoch, v1::TrainerReport::kListening));
  for (const RankReportRow& row : listening) job.endpoints[row.rank] = row.report.listening().address();
  PPFT_ASSIGN_OR_RETURN(const std::vector<RankReportRow> ready, store_->ListRankReports(id, epoch, v1::TrainerReport::kReady));
  for (const RankReportRow& row : ready) job.ready.insert(row.rank);
  PPFT_ASSIGN_OR_RETURN(const std::vector<RankReportRow> exported, store_->ListRankReports(id, epoch, v1::TrainerReport::kExported));
  for (const RankReportRow& row : exported) job.exported.insert(row.rank);
  return absl::OkStatus();
}

}  // namespace ppft::coordinator
