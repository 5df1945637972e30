// Which steps of this rank are recorded. Orders come from the agent at any time; the ranks gather the order that each has, and record from the next step on
// once all have the same: proto/ppft/v1/trace.proto.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/trainer/engine/activity.h"
#include "worker/trainer/engine/report.h"
#include "worker/trainer/engine/trace_orders.h"

namespace ppft::trainer {

// Thread: the engine's.
class Tracer {
 public:
  // All outlive this object.
  Tracer(const TraceOrders* orders, Activity* activity, Reporter* reporter) : orders_(orders), activity_(activity), reporter_(reporter) {}

  // The newest order that has not been carried out, for the gathering; 0: none.
  int64_t Offer();
  // What all ranks offered, this one among them.
  void Agree(const std::vector<int64_t>& offers);
  // Before the step: starts what was agreed upon, ends what has its steps.
  void BeginStep(int64_t step);
  // After the last step: ends what runs, and answers an order that comes too late.
  void Finish(int64_t last_step);

 private:
  // Spans of one message.
  static constexpr size_t kSpansPerReport = 20000;

  void Report(int64_t last_step);

  const TraceOrders* const orders_;
  Activity* const activity_;
  Reporter* const reporter_;
  TraceOrder offered_;
  bool agreed_ = false;      // upon offered_
  TraceOrder running_;       // id 0: none
  int64_t first_step_ = 0;   // of running_
  int64_t newest_done_ = 0;  // id of the newest order that was begun or answered
};

}  // namespace ppft::trainer
