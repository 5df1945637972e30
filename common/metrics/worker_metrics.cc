#include "common/metrics/metrics.h"
#include "common/metrics/series.h"

namespace ppft::metrics {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::Counter;
using prometheus::Gauge;

namespace {

Labels LabelsOf(const WorkerMetrics::Place& place, Labels labels = {}) {
  labels.insert({{"job", place.job}, {"stage", place.stage}, {"replica", place.replica}});
  return labels;
}

}  // namespace

struct WorkerMetrics::Impl {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  SeriesSet<Counter> busy{BuildCounter().Name("ppft_stage_busy_seconds_total").Help("What a stage's trainer spent its time on").Register(*registry), "job"};
  SeriesSet<Counter> transport{
      BuildCounter().Name("ppft_stage_transport_bytes_total").Help("Activation and gradient bytes between trainers").Register(*registry), "job"};
  SeriesSet<Gauge> memory{BuildGauge().Name("ppft_stage_memory_bytes").Help("Memory of a stage's trainer").Register(*registry), "job"};
  SeriesSet<Gauge> bubble{BuildGauge().Name("ppft_pipeline_bubble_ratio").Help("Idle share of the stage's time, newest report").Register(*registry), "job"};
  Gauge& connected = BuildGauge().Name("ppft_worker_connected").Help("1 while the stream to the coordinator stands").Register(*registry).Add({});
  Gauge& ranks = BuildGauge().Name("ppft_worker_ranks").Help("Trainers that live now").Register(*registry).Add({});
  Gauge& cache = BuildGauge().Name("ppft_worker_cache_bytes").Help("Bytes in the file cache").Register(*registry).Add({});
  FollowedTotals totals;
};

WorkerMetrics::WorkerMetrics(const std::string& version, const std::string& worker) : impl_(std::make_unique<Impl>()) {
  BuildGauge()
      .Name("ppft_build_info")
      .Help("1, with the version as a label")
      .Register(*impl_->registry)
      .Add({{"version", version}, {"component", "worker"}, {"worker", worker}})
      .Set(1);
}
WorkerMetrics::~WorkerMetrics() = default;
std::shared_ptr<prometheus::Registry> WorkerMetrics::registry() const { return impl_->registry; }

void WorkerMetrics::FollowStageBusy(const Place& place, const std::string& kind, double seconds) {
  const Labels labels = LabelsOf(place, {{"kind", kind}});
  impl_->busy.At(labels).Increment(impl_->totals.Growth(labels, seconds));
}
void WorkerMetrics::FollowStageTransport(const Place& place, const std::string& direction, double bytes) {
  const Labels labels = LabelsOf(place, {{"direction", direction}});
  impl_->transport.At(labels).Increment(impl_->totals.Growth(labels, bytes));
}
void WorkerMetrics::SetStageMemory(const Place& place, const std::string& memory_class, double bytes) {
  impl_->memory.At(LabelsOf(place, {{"class", memory_class}})).Set(bytes);
}
void WorkerMetrics::SetBubbleRatio(const Place& place, double ratio) { impl_->bubble.At(LabelsOf(place)).Set(ratio); }
void WorkerMetrics::BeginAttempt(const Place& place) { impl_->totals.Reset(LabelsOf(place)); }
void WorkerMetrics::DropJob(const std::string& job) {
  impl_->busy.Drop(job);
  impl_->transport.Drop(job);
  impl_->memory.Drop(job);
  impl_->bubble.Drop(job);
  impl_->totals.Forget("job", job);
}

void WorkerMetrics::SetConnected(bool connected) { impl_->connected.Set(connected ? 1 : 0); }
void WorkerMetrics::SetRanks(double running) { impl_->ranks.Set(running); }
void WorkerMetrics::SetCacheBytes(double bytes) { impl_->cache.Set(bytes); }

}  // namespace ppft::metrics
