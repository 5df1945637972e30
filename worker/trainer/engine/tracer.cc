#include "worker/trainer/engine/tracer.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace ppft::trainer {

int64_t Tracer::Offer() {
  offered_ = orders_->Get();
  if (offered_.id == newest_done_) offered_ = {};
  return offered_.id;
}

void Tracer::Agree(const std::vector<int64_t>& offers) {
  agreed_ = offered_.id != 0 && std::all_of(offers.begin(), offers.end(), [this](int64_t id) { return id == offered_.id; });
}

void Tracer::BeginStep(int64_t step) {
  if (running_.id != 0 && (agreed_ || step >= first_step_ + running_.num_steps)) Report(step - 1);
  if (!agreed_) return;
  agreed_ = false;
  running_ = offered_;
  newest_done_ = offered_.id;
  first_step_ = step;
  activity_->StartTrace();
}

void Tracer::Finish(int64_t last_step) {
  if (running_.id != 0) Report(last_step);
  const TraceOrder late = orders_->Get();
  if (late.id == 0 || late.id == newest_done_) return;
  newest_done_ = late.id;
  RankTrace nothing;
  nothing.id = late.id;
  nothing.last = true;
  reporter_->Trace(nothing);
}

void Tracer::Report(int64_t last_step) {
  std::vector<TraceSpan> spans = activity_->StopTrace();
  RankTrace trace;
  trace.id = running_.id;
  trace.first_step = first_step_;
  trace.last_step = last_step;
  trace.device_times = activity_->on_device();
  running_ = {};
  for (size_t begin = 0; !trace.last; begin += kSpansPerReport) {
    const size_t end = std::min(spans.size(), begin + kSpansPerReport);
    trace.spans.assign(std::make_move_iterator(spans.begin() + static_cast<std::ptrdiff_t>(begin)),
                       std::make_move_iterator(spans.begin() + static_cast<std::ptrdiff_t>(end)));
    trace.last = end == spans.size();
    reporter_->Trace(trace);
  }
}

}  // namespace ppft::trainer
