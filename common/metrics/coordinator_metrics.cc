#include "absl/time/clock.h"
#include "common/metrics/metrics.h"
#include "common/metrics/series.h"

namespace ppft::metrics {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;

namespace {

prometheus::Family<Gauge>& GaugeFamily(prometheus::Registry& registry, const std::string& name, const std::string& help) {
  return BuildGauge().Name(name).Help(help).Register(registry);
}
prometheus::Family<Counter>& CounterFamily(prometheus::Registry& registry, const std::string& name, const std::string& help) {
  return BuildCounter().Name(name).Help(help).Register(registry);
}
prometheus::Family<Histogram>& HistogramFamily(prometheus::Registry& registry, const std::string& name, const std::string& help) {
  return BuildHistogram().Name(name).Help(help).Register(registry);
}

const Histogram::BucketBoundaries& RpcBuckets() {
  static const auto* buckets = new Histogram::BucketBoundaries{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10};
  return *buckets;
}
const Histogram::BucketBoundaries& WaitBuckets() {
  static const auto* buckets = new Histogram::BucketBoundaries{0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600};
  return *buckets;
}

}  // namespace

struct CoordinatorMetrics::Impl {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  SeriesSet<Gauge> job_state{GaugeFamily(*registry, "ppft_job_state", "1 for the state the job is in, 0 for the others it has been in"), "job"};
  SeriesSet<Gauge> job_step{GaugeFamily(*registry, "ppft_job_step", "Optimizer steps done"), "job"};
  SeriesSet<Gauge> job_loss{GaugeFamily(*registry, "ppft_job_loss", "Training loss of the newest logged step, nats per supervised token"), "job"};
  SeriesSet<Gauge> job_eval_loss{GaugeFamily(*registry, "ppft_job_eval_loss", "Newest evaluation loss, nats per supervised token"), "job"};
  SeriesSet<Gauge> job_learning_rate{GaugeFamily(*registry, "ppft_job_learning_rate", "Learning rate of the newest logged step"), "job"};
  SeriesSet<Gauge> job_grad_norm{GaugeFamily(*registry, "ppft_job_grad_norm", "Global gradient norm before clipping"), "job"};
  SeriesSet<Gauge> job_loss_scale{GaugeFamily(*registry, "ppft_job_loss_scale", "Loss scale; 1 without scaling"), "job"};
  SeriesSet<Gauge> job_tokens_per_second{GaugeFamily(*registry, "ppft_job_tokens_per_second", "Tokens trained per second, newest report"), "job"};
  SeriesSet<Gauge> job_eta_seconds{GaugeFamily(*registry, "ppft_job_eta_seconds", "Estimated seconds until the last step"), "job"};
  SeriesSet<Gauge> checkpoint_age{GaugeFamily(*registry, "ppft_checkpoint_age_seconds", "Seconds since the job's newest committed checkpoint"), "job"};
  SeriesSet<Counter> job_tokens{CounterFamily(*registry, "ppft_job_tokens_total", "Tokens trained"), "job"};
  SeriesSet<Counter> job_skipped{CounterFamily(*registry, "ppft_job_skipped_steps_total", "Steps skipped because of an overflow"), "job"};
  SeriesSet<Counter> job_restarts{CounterFamily(*registry, "ppft_job_restarts_total", "Attempts given up, by reason"), "job"};
  FollowedTotals totals;

  Gauge& queue_depth = GaugeFamily(*registry, "ppft_queue_depth", "Jobs that wait for devices").Add({});
  Histogram& queue_wait = HistogramFamily(*registry, "ppft_queue_wait_seconds", "Time from QUEUED to STARTING").Add({}, WaitBuckets());
  SeriesSet<Gauge> workers{GaugeFamily(*registry, "ppft_workers", "Workers by state"), "state"};
  SeriesSet<Gauge> heartbeat_age{GaugeFamily(*registry, "ppft_worker_heartbeat_age_seconds", "Seconds since the worker's newest message"), "worker"};
  SeriesSet<Counter> rpc_requests{CounterFamily(*registry, "ppft_rpc_requests_total", "RPCs ended, by method and status code"), "method"};
  SeriesSet<Histogram> rpc_duration{HistogramFamily(*registry, "ppft_rpc_duration_seconds", "RPC duration on the server"), "method"};
  Histogram& store_commit = HistogramFamily(*registry, "ppft_store_commit_seconds", "SQLite commit, fsync included").Add({}, RpcBuckets());
  Histogram& checkpoint_save = HistogramFamily(*registry, "ppft_checkpoint_save_seconds", "From the first rank's file to the commit").Add({}, WaitBuckets());
  SeriesSet<Counter> artifact_bytes{CounterFamily(*registry, "ppft_artifact_bytes_total", "File bytes moved by the coordinator"), "direction"};
  Counter& stale_epoch = CounterFamily(*registry, "ppft_stale_epoch_rejected_total", "Messages of a given-up attempt that were refused").Add({});

  std::mutex mutex;
  std::map<std::string, std::string> state_of;      // job -> state word; guarded by mutex
  std::map<std::string, absl::Time> checkpoint_of;  // job -> commit time; guarded by mutex
};

CoordinatorMetrics::CoordinatorMetrics(const std::string& version) : impl_(std::make_unique<Impl>()) {
  GaugeFamily(*impl_->registry, "ppft_build_info", "1, with the version as a label").Add({{"version", version}, {"component", "coordinator"}}).Set(1);
  impl_->workers.At({{"state", "ready"}}).Set(0);
  impl_->workers.At({{"state", "lost"}}).Set(0);
  for (const char* direction : {"upload", "download"}) impl_->artifact_bytes.At({{"direction", direction}});
}
CoordinatorMetrics::~CoordinatorMetrics() = default;
std::shared_ptr<prometheus::Registry> CoordinatorMetrics::registry() const { return impl_->registry; }

void CoordinatorMetrics::SetJobState(const std::string& job, const std::string& state) {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  std::string& current = impl_->state_of[job];
  if (!current.empty() && current != state) impl_->job_state.At({{"job", job}, {"state", current}}).Set(0);
  current = state;
  impl_->job_state.At({{"job", job}, {"state", state}}).Set(1);
}
void CoordinatorMetrics::SetJobStep(const std::string& job, double step) { impl_->job_step.At({{"job", job}}).Set(step); }
void CoordinatorMetrics::SetJobLoss(const std::string& job, double loss) { impl_->job_loss.At({{"job", job}}).Set(loss); }
void CoordinatorMetrics::SetJobEvalLoss(const std::string& job, double loss) { impl_->job_eval_loss.At({{"job", job}}).Set(loss); }
void CoordinatorMetrics::SetJobLearningRate(const std::string& job, double rate) { impl_->job_learning_rate.At({{"job", job}}).Set(rate); }
void CoordinatorMetrics::SetJobGradNorm(const std::string& job, double norm) { impl_->job_grad_norm.At({{"job", job}}).Set(norm); }
void CoordinatorMetrics::SetJobLossScale(const std::string& job, double scale) { impl_->job_loss_scale.At({{"job", job}}).Set(scale); }
void CoordinatorMetrics::SetJobTokensPerSecond(const std::string& job, double rate) { impl_->job_tokens_per_second.At({{"job", job}}).Set(rate); }
void CoordinatorMetrics::SetJobEtaSeconds(const std::string& job, double seconds) { impl_->job_eta_seconds.At({{"job", job}}).Set(seconds); }
void CoordinatorMetrics::SetCheckpointTime(const std::string& job, absl::Time committed) {
  impl_->checkpoint_age.At({{"job", job}}).Set(absl::ToDoubleSeconds(absl::Now() - committed));
  std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->checkpoint_of[job] = committed;
}
void CoordinatorMetrics::FollowJobTokens(const std::string& job, double all, double supervised) {
  for (const auto& [kind, total] : {std::pair<std::string, double>{"all", all}, {"supervised", supervised}}) {
    const Labels labels = {{"job", job}, {"kind", kind}};
    impl_->job_tokens.At(labels).Increment(impl_->totals.Growth(labels, total));
  }
}
void CoordinatorMetrics::FollowJobSkippedSteps(const std::string& job, double total) {
  impl_->job_skipped.At({{"job", job}}).Increment(impl_->totals.Growth({{"job", job}, {"total", "skipped"}}, total));
}
void CoordinatorMetrics::AddJobRestart(const std::string& job, const std::string& reason_code) {
  impl_->job_restarts.At({{"job", job}, {"reason", reason_code}}).Increment();
}
void CoordinatorMetrics::DropJob(const std::string& job) {
  for (SeriesSet<Gauge>* set : {&impl_->job_state, &impl_->job_step, &impl_->job_loss, &impl_->job_eval_loss, &impl_->job_learning_rate, &impl_->job_grad_norm,
                                &impl_->job_loss_scale, &impl_->job_tokens_per_second, &impl_->job_eta_seconds, &impl_->checkpoint_age}) {
    set->Drop(job);
  }
  for (SeriesSet<Counter>* set : {&impl_->job_tokens, &impl_->job_skipped, &impl_->job_restarts}) set->Drop(job);
  impl_->totals.Forget("job", job);
  std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->state_of.erase(job);
  impl_->checkpoint_of.erase(job);
}

void CoordinatorMetrics::SetQueueDepth(double jobs) { impl_->queue_depth.Set(jobs); }
void CoordinatorMetrics::ObserveQueueWait(absl::Duration wait) { impl_->queue_wait.Observe(absl::ToDoubleSeconds(wait)); }
void CoordinatorMetrics::SetWorkers(const std::string& state, double count) { impl_->workers.At({{"state", state}}).Set(count); }
void CoordinatorMetrics::SetWorkerHeartbeatAge(const std::string& worker, absl::Duration age) {
  impl_->heartbeat_age.At({{"worker", worker}}).Set(absl::ToDoubleSeconds(age));
  std::lock_guard<std::mutex> lock(impl_->mutex);
  for (const auto& [job, committed] : impl_->checkpoint_of) impl_->checkpoint_age.At({{"job", job}}).Set(absl::ToDoubleSeconds(absl::Now() - committed));
}
void CoordinatorMetrics::DropWorker(const std::string& worker) { impl_->heartbeat_age.Drop(worker); }
void CoordinatorMetrics::CountRpc(const std::string& method, const std::string& code, absl::Duration duration) {
  impl_->rpc_requests.At({{"method", method}, {"code", code}}).Increment();
  impl_->rpc_duration.At({{"method", method}}, RpcBuckets()).Observe(absl::ToDoubleSeconds(duration));
}
void CoordinatorMetrics::ObserveStoreCommit(absl::Duration duration) { impl_->store_commit.Observe(absl::ToDoubleSeconds(duration)); }
void CoordinatorMetrics::ObserveCheckpointSave(absl::Duration duration) { impl_->checkpoint_save.Observe(absl::ToDoubleSeconds(duration)); }
void CoordinatorMetrics::AddArtifactBytes(const std::string& direction, double bytes) { impl_->artifact_bytes.At({{"direction", direction}}).Increment(bytes); }
void CoordinatorMetrics::CountStaleEpoch() { impl_->stale_epoch.Increment(); }

}  // namespace ppft::metrics
