// The life of one rank on this host: start its trainer, fetch its files meanwhile, pass reports on, upload what it writes, watch its progress, end it.
//
// Up to four threads: one fetches, forks, reads reports and reaps; one forwards reports in order, each after its files are uploaded; one watches a trainer that
// has its orders; after Stop one waits for the end. Thread: all public methods from any; none blocks except the destructor, which ends the trainer and joins.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "common/metrics/metrics.h"
#include "ppft/v1/worker.pb.h"
#include "worker/agent/file_cache.h"
#include "worker/agent/report_queue.h"
#include "worker/agent/trainer_process.h"

namespace ppft::agent {

// Constant for the agent's life.
struct RankEnvironment {
  FileCache* cache;
  ReportQueue* reports;
  metrics::WorkerMetrics* metrics;
  std::string trainer_binary;
  std::vector<std::string> trainer_environment;  // "NAME=value"
  std::string address;                           // where trainers listen for peers
  std::string work_directory;                    // ranks live in work_directory/ranks
  std::string worker_name;
  // Uploads a file; UNAVAILABLE may be tried again, FAILED_PRECONDITION means that the attempt was given up.
  std::function<absl::Status(const v1::RankKey&, const v1::LocalFile&)> upload;
  std::function<void()> on_end;  // after running() has become false
};

class RankRunner {
 public:
  RankRunner(const RankEnvironment& environment, v1::RankDirective directive);
  ~RankRunner();

  // The directive again, perhaps with the peers' endpoints now or another trace.
  void Update(const v1::RankDirective& directive);
  // Ends the trainer without a report: SIGTERM, then SIGKILL after a grace.
  void Stop();
  // False once nothing of this rank can act any more: the trainer is reaped and no upload is under way.
  bool running() const { return running_; }
  const v1::RankKey& key() const { return directive_.rank(); }
  const std::string& device() const { return directive_.device(); }

 private:
  void Run();
  absl::Status MakeFolders();
  // Fetches what the rank needs and says it in `start`.
  absl::Status Prepare(v1::Start* start);
  absl::Status FetchCheckpoint(const v1::CheckpointManifest& manifest, google::protobuf::RepeatedPtrField<v1::LocalFile>* out);
  absl::Status FetchInputs(v1::Start* start);
  absl::Status FetchFiles(const std::vector<v1::FileRef>& files);
  std::string InputPath(const v1::FileRef& file) const;
  TrainerCommand Command() const;
  void Tell(const v1::AgentMessage& message);
  // With mutex_ held: what the trainer has not been told yet.
  void TellTrainer();
  void ReadReports();
  void Forward();
  absl::Status UploadFiles(v1::TrainerReport* report);
  void WatchProgress();
  void Enqueue(v1::TrainerReport report);
  void RecordStats(const v1::StageStats& stats);
  // Why the rank did not begin.
  v1::TrainerReport StartFailure(const absl::Status& status) const;
  v1::TrainerReport FailureReport(const std::string& code, const std::string& owner, const std::string& message, const std::string& remedy) const;

  const RankEnvironment& environment_;
  const v1::RankDirective directive_;  // as first received; peers come by Update
  const std::string directory_;
  TrainerProcess process_;
  metrics::WorkerMetrics::Place place_;  // of the running thread
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> running_ = true;

  std::mutex mutex_;
  std::condition_variable changed_;
  v1::Peers peers_;                      // guarded by mutex_
  bool started_ = false;                 // guarded by mutex_: Start was sent
  bool peers_sent_ = false;              // guarded by mutex_
  v1::TraceOrder trace_;                 // guarded by mutex_: the newest
  int64_t trace_sent_ = 0;               // guarded by mutex_: its id, once sent
  bool reads_done_ = false;              // guarded by mutex_
  std::deque<v1::TrainerReport> queue_;  // guarded by mutex_

  int64_t corrupt_step_ = 0;  // run_thread_'s: of the checkpoint that the coordinator does not have any more
  std::thread run_thread_;
  std::thread watch_thread_;
};

}  // namespace ppft::agent
