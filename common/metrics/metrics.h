// Every metric of the product: name, unit, labels and meaning (prometheus-cpp). The only room that touches Prometheus.
//
// Thread: all methods may be called from any thread. A series of a job appears with its first value; DropJob takes a job's series away.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace prometheus {
class Registry;
}

namespace ppft::metrics {

// Serves GET /metrics (text format 0.0.4) and, if given, GET /sd: Prometheus's HTTP service discovery document.
class HttpServer {
 public:
  // `listen` is HOST:PORT, port 0 = any. INVALID_ARGUMENT if it is not; UNAVAILABLE if the port is in use or the address not of this host. The messages name
  // --metrics_listen.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& listen, std::shared_ptr<prometheus::Registry> registry,
                                                           std::function<std::string()> service_discovery = nullptr);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  const std::string& address() const;  // HOST:PORT, as bound

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The coordinator's series.
class CoordinatorMetrics {
 public:
  explicit CoordinatorMetrics(const std::string& version);
  ~CoordinatorMetrics();
  std::shared_ptr<prometheus::Registry> registry() const;

  // Job. `state` is the word without prefix ("RUNNING"): its gauge is 1, the job's other states are 0.
  void SetJobState(const std::string& job, const std::string& state);
  void SetJobStep(const std::string& job, double step);
  void SetJobLoss(const std::string& job, double loss);
  void SetJobEvalLoss(const std::string& job, double loss);
  void SetJobLearningRate(const std::string& job, double rate);
  void SetJobGradNorm(const std::string& job, double norm);
  void SetJobLossScale(const std::string& job, double scale);
  void SetJobTokensPerSecond(const std::string& job, double rate);
  void SetJobEtaSeconds(const std::string& job, double seconds);
  void SetCheckpointTime(const std::string& job, absl::Time committed);
  // Counters follow totals of the job: growth is added, a total that went back (recovery) adds nothing.
  void FollowJobTokens(const std::string& job, double all, double supervised);
  void FollowJobSkippedSteps(const std::string& job, double total);
  void AddJobRestart(const std::string& job, const std::string& reason_code);
  void DropJob(const std::string& job);

  // Service.
  void SetQueueDepth(double jobs);
  void ObserveQueueWait(absl::Duration wait);
  void SetWorkers(const std::string& state, double count);
  void SetWorkerHeartbeatAge(const std::string& worker, absl::Duration age);
  void DropWorker(const std::string& worker);
  void CountRpc(const std::string& method, const std::string& code, absl::Duration duration);
  void ObserveStoreCommit(absl::Duration duration);
  void ObserveCheckpointSave(absl::Duration duration);
  void AddArtifactBytes(const std::string& direction, double bytes);  // upload | download
  void CountStaleEpoch();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// An agent's series.
class WorkerMetrics {
 public:
  WorkerMetrics(const std::string& version, const std::string& worker);
  ~WorkerMetrics();
  std::shared_ptr<prometheus::Registry> registry() const;

  // A rank's place in its job's mesh, which its series are named by: several replicas of a stage may share a worker.
  struct Place {
    std::string job;
    std::string stage;
    std::string replica;
  };
  // Totals since the attempt's start, one call per report. `kind`: forward | backward | optimizer | send | recv | idle.
  void FollowStageBusy(const Place& place, const std::string& kind, double seconds);
  void FollowStageTransport(const Place& place, const std::string& direction, double bytes);  // sent | received
  void SetStageMemory(const Place& place, const std::string& memory_class, double bytes);     // resident_peak
  void SetBubbleRatio(const Place& place, double ratio);
  // A new attempt's totals begin at zero.
  void BeginAttempt(const Place& place);
  void DropJob(const std::string& job);

  void SetConnected(bool connected);
  void SetRanks(double running);
  void SetCacheBytes(double bytes);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ppft::metrics
