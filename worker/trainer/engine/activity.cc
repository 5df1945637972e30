#include "worker/trainer/engine/activity.h"

#include <algorithm>
#include <utility>

namespace ppft::trainer {
namespace {

// Beyond this many the device is asked even where nobody has waited for it.
constexpr size_t kMaxUpcoming = 4096;

int64_t SteadyNanos() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// From the steady clock to Unix time: the same in all processes of a host. The closest of several looks, since one may be interrupted.
int64_t SteadyToUnix() {
  int64_t offset = 0, closest = INT64_MAX;
  for (int look = 0; look < 8; ++look) {
    const int64_t before = SteadyNanos();
    const int64_t unix_nanos = UnixNanos();
    const int64_t took = SteadyNanos() - before;
    if (took >= closest) continue;
    closest = took;
    offset = unix_nanos - before - took / 2;
  }
  return offset;
}

Busy KindOf(Section section) {
  switch (section) {
    case Section::kForward:
      return Busy::kForward;
    case Section::kBackward:
      return Busy::kBackward;
    case Section::kOptimizer:
      return Busy::kOptimizer;
    case Section::kSend:
      return Busy::kSend;
    case Section::kReceive:
    case Section::kReduce:
      return Busy::kReceive;
    default:
      return Busy::kIdle;
  }
}

std::optional<TraceRow> RowOf(Section section) {
  switch (section) {
    case Section::kForward:
    case Section::kBackward:
      return TraceRow::kCompute;
    case Section::kSend:
      return TraceRow::kSend;
    case Section::kReceive:
      return TraceRow::kReceive;
    case Section::kReduce:
      return TraceRow::kCollective;
    case Section::kOptimizer:
      return TraceRow::kOptimizer;
    case Section::kCheckpoint:
      return TraceRow::kCheckpoint;
    default:
      return std::nullopt;
  }
}

}  // namespace

int64_t UnixNanos() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count(); }

Activity::Activity(Beat* beat) : beat_(beat), entered_nanos_(SteadyNanos()) {}

void Activity::UseDevice(std::unique_ptr<DeviceTimer> timer) {
  Close(SteadyNanos());
  timer_ = std::move(timer);
  entered_nanos_ = 0;
  timer_->Mark();
  upcoming_.push_back(phase_);
}

void Activity::Enter(Section section, const pipeline::Action* action) {
  Change(section, action);
  WriteBeat(beat_, section, step_.load(std::memory_order_relaxed), action == nullptr ? -1 : action->microbatch);
}

void Activity::Change(Section section, const pipeline::Action* action) {
  Phase next;
  next.section = section;
  if (action != nullptr) next.action = *action;
  next.step = step_.load(std::memory_order_relaxed);
  next.evaluation = evaluation_;
  next.traced = tracing_;
  if (timer_ == nullptr) {
    Close(SteadyNanos());
    phase_ = next;
    return;
  }
  timer_->Mark();
  upcoming_.push_back(next);
  if (upcoming_.size() >= kMaxUpcoming) Collect();
}

void Activity::Collect() {
  if (timer_ == nullptr) return;
  for (const int64_t nanos : timer_->Collect()) {
    Close(nanos);
    phase_ = upcoming_.front();
    upcoming_.pop_front();
  }
}

void Activity::Close(int64_t end_nanos) {
  const int64_t begin_nanos = std::exchange(entered_nanos_, end_nanos);
  nanoseconds_[static_cast<size_t>(KindOf(phase_.section))].fetch_add(end_nanos - begin_nanos, std::memory_order_relaxed);
  if (!phase_.traced) return;
  const std::optional<TraceRow> row = RowOf(phase_.section);
  if (!row.has_value()) return;
  TraceSpan span;
  span.row = *row;
  span.name = phase_.action.has_value() ? pipeline::ToString(*phase_.action) : SectionName(phase_.section);
  span.step = phase_.step;
  if (phase_.action.has_value()) {
    span.stage = phase_.action->stage;
    span.microbatch = phase_.action->microbatch;
  }
  span.begin_unix_nanos = begin_nanos + clock_nanos_;
  span.duration_nanos = end_nanos - begin_nanos;
  span.evaluation = phase_.evaluation;
  spans_.push_back(std::move(span));
}

void Activity::StartTrace() {
  Rest();
  if (timer_ != nullptr) {
    timer_->Wait();
    clock_nanos_ = UnixNanos();
    Collect();
    clock_nanos_ -= entered_nanos_;
  } else {
    clock_nanos_ = SteadyToUnix();
  }
  spans_.clear();
  tracing_ = true;
}

std::vector<TraceSpan> Activity::StopTrace() {
  tracing_ = false;
  Rest();
  if (timer_ != nullptr) {
    timer_->Wait();
    Collect();
  }
  std::stable_sort(spans_.begin(), spans_.end(), [](const TraceSpan& a, const TraceSpan& b) { return a.begin_unix_nanos < b.begin_unix_nanos; });
  return std::exchange(spans_, {});
}

}  // namespace ppft::trainer
