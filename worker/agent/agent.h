// The agent: holds the link, reconciles the coordinator's desired state with the ranks that run, and moves files. Trainers go on while the
// coordinator is away.
//
// Thread: Run blocks until Shutdown, which may be called from any thread.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "common/metrics/metrics.h"
#include "common/net/channel.h"
#include "worker/agent/file_cache.h"
#include "worker/agent/link.h"
#include "worker/agent/rank_runner.h"
#include "worker/agent/report_queue.h"

namespace ppft::agent {

struct AgentOptions {
  std::string coordinator;  // HOST:PORT
  std::string name;
  std::string address;  // where trainers listen for peers
  std::string work_directory;
  std::string trainer_binary;
  std::string version;
  std::vector<std::string> trainer_environment;  // "NAME=value"
  std::string metrics_address;                   // HOST:PORT, as others reach it
  net::ChannelOptions channel;
  int64_t cache_limit_bytes = int64_t{100} << 30;
  std::vector<v1::Device> devices;
  v1::HostFacts host;
  std::vector<std::string> problems;  // why it offers less than it was started for, each a sentence
};

class Agent {
 public:
  Agent(AgentOptions options, metrics::WorkerMetrics* metrics);
  ~Agent();

  // Takes the work folder (one agent per folder), then serves. Returns after Shutdown, or with the coordinator's refusal of this version; all trainers have
  // ended then.
  absl::Status Run();
  void Shutdown();

 private:
  using Key = std::tuple<std::string, int64_t, int>;  // job, epoch, rank

  // Locks the work folder and clears it of what ranks of an earlier incarnation left.
  absl::Status TakeWorkFolder();
  LinkCallbacks MakeCallbacks();
  // Returns when all trainers have ended.
  void StopRanks();
  void OnDirective(const v1::Directive& directive);
  void StartOrUpdate(const v1::RankDirective& directive);
  std::vector<v1::RankKey> Running();
  void Reap();
  absl::Status Download(const std::string& sha256, int64_t offset, bool check, const FileCache::Sink& sink);
  absl::Status Upload(const v1::RankKey& rank, const v1::LocalFile& file);

  const AgentOptions options_;
  const std::string incarnation_;
  metrics::WorkerMetrics* const metrics_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::WorkerService::Stub> stub_;
  ReportQueue reports_;
  std::vector<std::unique_ptr<v1::WorkerService::Stub>> downloads_;  // each with a connection of its own
  std::atomic<size_t> next_download_ = 0;
  FileCache cache_;
  RankEnvironment environment_;
  Fd lock_;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool shutdown_ = false;                             // guarded by mutex_
  absl::Status refusal_;                              // guarded by mutex_
  bool dirty_ = false;                                // guarded by mutex_: Reap has something to look at
  std::map<Key, std::unique_ptr<RankRunner>> ranks_;  // guarded by mutex_: what is wanted
  std::vector<std::unique_ptr<RankRunner>> leaving_;  // guarded by mutex_: told to stop, not joined yet
  std::map<Key, v1::RankDirective> waiting_;          // guarded by mutex_: wanted, but their device is not free yet
  std::unique_ptr<Link> link_;                        // constant while Run serves
};

}  // namespace ppft::agent
