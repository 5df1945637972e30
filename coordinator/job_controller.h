// JobController: the controller of jobs and workers. See controller.h for threads and transactions.
//
// Handlers change the entries in memory and append to the store; at the end of each batch the queue is decided, changed entries are written,
// the transaction is committed, and only then do directives, acknowledgements and answers go out. If a commit fails, nothing has been said to
// anybody: the state is loaded again from the store and the workers' streams are closed, so that they send again what was not acknowledged.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "common/metrics/metrics.h"
#include "coordinator/controller.h"
#include "coordinator/core/cause.h"
#include "coordinator/core/disk.h"
#include "coordinator/core/queue.h"
#include "coordinator/core/retry.h"
#include "coordinator/work_pool.h"
#include "ppft/v1/cluster.pb.h"
#include "ppft/v1/worker.pb.h"

namespace ppft::coordinator {

// The coordinator's end of one worker's stream. Called on the controller's thread; must not block.
class WorkerLink {
 public:
  virtual ~WorkerLink() = default;
  virtual void Send(v1::CoordinatorMessage message) = 0;
  virtual void Close(absl::Status status) = 0;
};

// The planner with the model's record at hand. PURE.
using ModelPlanFunction =
    std::function<PlanAttempt(const v1::JobRecord&, const v1::ModelRecord&, const std::vector<OfferedDevice>& devices, const std::string& kind)>;

struct ControllerOptions {
  std::string version;  // of the coordinator; workers of another one are refused. "": any may come
  absl::Duration heartbeat_interval = absl::Seconds(2);
  absl::Duration lease = absl::Seconds(15);
  absl::Duration gpu_wait = absl::Hours(1);              // how long GPUs that are away keep jobs from CPU slots
  absl::Duration cause_grace = absl::Milliseconds(750);  // how long a broken link waits for its cause; the agents look twice a second
  absl::Duration work_retry_delay = absl::Seconds(5);    // before preparing or assembling again
  int max_prepares = 2;                                  // at once
  std::function<absl::Time()> wall;                      // default: absl::Now
  std::function<absl::Time()> steady;                    // default: a clock that never goes back; only differences count
};

class JobController : public Controller {
 public:
  // `work` and `metrics` outlive the controller.
  JobController(std::unique_ptr<JobStore> store, JobWork* work, metrics::CoordinatorMetrics* metrics, ModelPlanFunction plan, ControllerOptions options);
  ~JobController() override;

  // Loads all tables, rebuilds the state and starts the thread.
  absl::Status Start();
  // Ends the thread after what was posted so far; later posts get UNAVAILABLE. Waits for the pool.
  void Stop();

  void Post(Body body, Done done) override;
  using Controller::Post;
  void Work(absl::AnyInvocable<void()> work) override { pool_.Run(std::move(work)); }
  absl::Status CheckEpoch(const v1::RankKey& rank) override;
  void ReportDiskFull(const v1::RankKey& rank, int64_t needed_bytes, const std::string& message) override;

  // All below: on the controller's thread, in a body (writes) or in a body or done (reads).

  // Inserts a checked spec. The same (request_id, payload) gives the first job.
  absl::StatusOr<v1::Job> Submit(const v1::JobSpec& spec, const std::string& request_id, const std::string& payload_sha256);
  absl::StatusOr<v1::Job> Cancel(const std::string& id, const std::string& request_id, const std::string& payload_sha256);
  // By id, or by a name that only one job has. NOT_FOUND; FAILED_PRECONDITION if several have the name.
  absl::StatusOr<const v1::Job*> FindJob(const std::string& id_or_name) const;
  std::vector<const v1::JobRecord*> NewestJobs() const;  // newest first
  absl::StatusOr<const v1::ModelRecord*> Model(const std::string& name);
  std::vector<v1::Worker> Workers() const;
  void DeviceCounts(int* all, int* free) const;
  // Devices that count for "could this job ever run here": of workers that are not lost.
  std::vector<OfferedDevice> AllDevices() const;
  // GPUs that the cluster does not have at the moment and that jobs wait for.
  std::vector<AwayGpus> GpusAway() const;
  JobStore& store() { return *store_; }
  int64_t now_unix_ms() const { return absl::ToUnixMillis(options_.wall()); }
  // Calls `changed` after each commit that changed the job, its events or its logs.
  int64_t Subscribe(const std::string& job_id, std::function<void()> changed);
  void Unsubscribe(int64_t subscription);

  // Traces (trace_events.cc). One at a time for a job: FAILED_PRECONDITION while another is under way, or if no step is left. Answers its id.
  absl::StatusOr<int64_t> BeginTrace(const std::string& id, int num_steps);
  // Nothing if it is over.
  void EndTrace(const std::string& id, int64_t trace);
  // True: all ranks have answered, `out` has it all. Subscribers of the job are called when something came.
  absl::StatusOr<bool> TakeTrace(const std::string& id, int64_t trace, std::deque<v1::TraceJobResponse>* out);

  // The worker stream, on the controller's thread, in a body. OnHello answers INVALID_ARGUMENT for a hello that makes no sense,
  // FAILED_PRECONDITION (VERSION_MISMATCH) for a worker of another version.
  absl::Status OnHello(const std::shared_ptr<WorkerLink>& link, const v1::WorkerHello& hello);
  absl::Status OnWorkerMessage(const std::shared_ptr<WorkerLink>& link, const v1::WorkerMessage& message);
  void OnWorkerClosed(const std::shared_ptr<WorkerLink>& link);

 private:
  using Key = std::tuple<std::string, int64_t, int32_t>;  // job, epoch, rank

  // A rank of a given-up attempt that may still act.
  struct Remnant {
    Key key;
    std::string worker;
    std::string incarnation;
    std::string device;
    int64_t revision = 0;  // of the first directive without it; 0 = not sent yet
  };

  struct TraceRun {
    v1::TraceOrder order;
    std::set<int32_t> done;  // ranks of the present attempt that have answered
    std::deque<v1::TraceJobResponse> parts;
  };

  struct JobEntry {
    v1::JobRecord record;
    int64_t stored_epoch = 0;
    std::map<int32_t, std::string> endpoints;  // of the present attempt, like all below
    std::set<int32_t> ready;
    std::set<int32_t> exported;
    std::vector<v1::FileRef> init_adapter;
    AttemptFailures failures;  // not empty: wait for a better cause until failure_deadline
    absl::Time failure_deadline;
    int checks_running = 0;                           // of the files that the attempt goes on from: its failures wait for them
    std::vector<v1::CheckpointManifest> checkpoints;  // by step; the damaged ones are in the store alone
    std::optional<TraceRun> trace;                    // kept over attempts
    std::map<int64_t, absl::Time> first_written;      // checkpoint step -> when the first rank's file came
    int64_t queued_unix_ms = 0;
    int64_t work_id = 0;  // of the preparation or assembly under way; 0 = none
    int work_failures = 0;
    int disk_pauses = 0;                                 // since something of the job was stored
    absl::Time work_after;                               // steady: no work and no end of a pause before
    absl::Time drop_series_at = absl::InfiniteFuture();  // steady
    std::shared_ptr<std::atomic<bool>> work_cancelled;
    bool changed = false;         // the record
    bool status_changed = false;  // status alone
  };

  struct WorkerEntry {
    v1::Worker shown;                  // name, incarnation, address, version, devices, connect_time
    std::shared_ptr<WorkerLink> link;  // nullptr: not connected
    bool lost = false;                 // the lease ran out
    absl::Time last_seen;              // steady
    std::set<Key> running;
    int64_t applied_revision = 0;
    int64_t acked_seq = 0;
    int32_t num_gpus = 0;           // see WorkerRow
    int64_t gpus_away_unix_ms = 0;  // see WorkerRow
    bool ack_due = false;
    bool directive_due = false;
    bool row_changed = false;
  };

  struct Task {
    Body body;
    Done done;
  };

  // The loop (job_controller.cc).
  void Loop();
  void RunBatch(std::deque<Task> tasks);
  absl::Status RunBodies(std::deque<Task>& tasks, std::vector<absl::Status>& results);
  absl::Status Load();
  absl::Status LoadJob(v1::JobRecord record);
  absl::Status EndOfBatch();
  absl::Status FlushJobs();
  absl::Status FlushWorkers();
  void AfterCommit();
  void Reload(const absl::Status& why);
  absl::Duration NextWake() const;
  void Broken(const absl::Status& status) {
    if (batch_status_.ok()) batch_status_ = status;
  }

  // Jobs (job_events.cc), their work on the pool (job_work.cc), their attempts (attempt_events.cc), a full disk (disk_events.cc).
  JobEntry* FindEntry(const std::string& id);
  void Move(JobEntry& job, v1::JobState to, const v1::Reason& reason, const std::string& actor = "coordinator");
  void AddNote(JobEntry& job, const v1::Reason& reason, const std::string& actor = "coordinator");
  void Append(JobEntry& job, const v1::Event& event);
  void AddLog(JobEntry& job, const std::string& source, const std::string& severity, const std::string& text);
  void TickJobs();
  void StartWork();
  void StartPrepare(JobEntry& job);
  void OnPrepared(const std::string& id, int64_t work_id, const absl::StatusOr<v1::PreparedData>& result);
  void StartAssemble(JobEntry& job);
  void OnAssembled(const std::string& id, int64_t work_id, const absl::StatusOr<std::vector<v1::ArtifactManifest>>& result);
  bool RetryWork(JobEntry& job, const absl::Status& status);  // false: it has failed for good
  void DecideStarts();
  void StartAttempt(JobEntry& job, const v1::Plan& plan, const v1::Reason& reason);
  void DropWork(JobEntry& job);
  void EndAttempt(JobEntry& job);  // from a state with ranks: fence, forget promises, watch the remnants
  void OnFailure(JobEntry& job, const Failure& failure);
  void Fail(JobEntry& job, const Failure& failure);
  void GiveUp(JobEntry& job, const v1::Reason& reason);  // to RECOVERING, back to where the newest checkpoint is
  void FinishGivingUp(JobEntry& job);
  void PauseForDisk(JobEntry& job, const std::string& what, int64_t needed_bytes);  // from PREPARING, QUEUED or a state with ranks
  void TickDisk();
  bool AllExported(const JobEntry& job) const;
  absl::Status LoadInitAdapter(JobEntry& job);

  // Reports of ranks (report_events.cc).
  void OnReport(WorkerEntry& worker, const v1::RankReport& report);
  void OnCurrentReport(JobEntry& job, const WorkerEntry& worker, const v1::RankReport& report);
  void OnStep(JobEntry& job, const v1::StepReport& report);
  void OnEval(JobEntry& job, const v1::EvalReport& report, const std::string& actor);
  void OnCheckpoint(JobEntry& job, const v1::RankReport& report);
  void OnFinished(JobEntry& job, const v1::RankReport& report);
  void OnExported(JobEntry& job, const v1::RankReport& report);
  void OnExited(JobEntry& job, const WorkerEntry& worker, const v1::RankReport& report);
  void CommitCheckpoint(JobEntry& job, v1::CheckpointManifest manifest);
  // A rank could not go on from its checkpoint: the files here are looked at, on the pool, and only what is found damaged or lost costs a checkpoint.
  void CheckCheckpoint(JobEntry& job, const Failure& failure);
  void OnCheckpointChecked(const std::string& id, int64_t epoch, Failure failure, const std::map<int64_t, std::string>& damage);
  // Nothing goes on from it any more, nor from those that need it. False: it was put aside before.
  bool MarkDamaged(JobEntry& job, int64_t step, const std::string& why);
  void DropUnreferenced(const std::set<std::string>& contents);
  void OnTrace(JobEntry& job, const WorkerEntry& worker, const v1::RankPlan& rank, const v1::RankTrace& trace);

  // Workers (worker_events.cc).
  WorkerEntry& EntryOf(const std::string& name);
  WorkerEntry* ByLink(const std::shared_ptr<WorkerLink>& link);
  void TickWorkers();
  void NoteGpus(WorkerEntry& worker);  // after its devices, problems or loss have changed, and as time goes by
  void LoseRanks(const WorkerEntry& worker, const std::string& why);
  std::set<std::string> Unreachable(const v1::Plan& plan) const;
  void SendDirectives();
  v1::Directive DirectiveFor(const std::string& worker);
  void DirectivesChanged(const JobEntry& job);
  bool IsGone(const Remnant& remnant) const;
  void SweepRemnants();
  std::vector<OfferedDevice> FreeDevices() const;
  bool IsWanted(const Key& key) const;

  const std::unique_ptr<JobStore> store_;
  JobWork* const work_;
  metrics::CoordinatorMetrics* const metrics_;
  const ModelPlanFunction plan_;
  const ControllerOptions options_;

  // The controller's thread.
  std::map<std::string, JobEntry> jobs_;
  std::map<std::string, WorkerEntry> workers_;
  std::map<std::string, v1::ModelRecord> models_;  // cache; a registered model never changes
  std::vector<Remnant> remnants_;
  std::map<int64_t, std::pair<std::string, std::function<void()>>> subscriptions_;
  std::set<std::string> changed_jobs_;  // in this batch
  std::vector<std::function<void()>> after_commit_;
  absl::Status batch_status_;  // the first error of a handler: the batch is rolled back
  int64_t next_submit_order_ = 1;
  int64_t next_subscription_ = 1;
  int64_t next_work_id_ = 1;
  int64_t next_trace_id_ = 1;
  int64_t next_revision_ = 1;
  DiskRoom disk_;  // as of the last batch
  int prepares_running_ = 0;
  bool queue_changed_ = true;
  bool loaded_ = false;
  bool numbered_ = false;  // next_revision_ and next_trace_id_ are above those of all processes before

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> tasks_;  // guarded by mutex_
  bool stopping_ = false;   // guarded by mutex_
  std::thread thread_;
  WorkPool pool_;
};

}  // namespace ppft::coordinator
