#include "coordinator/core/queue.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/job_state.h"

namespace ppft::coordinator {
namespace {

void TakeDevices(const v1::Plan& plan, std::vector<OfferedDevice>& free) {
  for (const v1::RankPlan& rank : plan.ranks()) {
    free.erase(std::remove_if(free.begin(), free.end(),
                              [&](const OfferedDevice& device) { return device.worker == rank.worker() && device.device.id() == rank.device(); }),
               free.end());
  }
}

std::string Devices(int count) { return absl::StrCat(count, count == 1 ? " device" : " devices"); }

}  // namespace

std::vector<QueueDecision> DecideQueue(std::vector<const v1::JobRecord*> queued, std::vector<OfferedDevice> free, const std::vector<OfferedDevice>& all,
                                       const PlanFunction& plan, int64_t now_unix_ms) {
  std::stable_sort(queued.begin(), queued.end(), [](const v1::JobRecord* a, const v1::JobRecord* b) {
    return std::make_pair(-a->job().spec().priority(), a->submit_order()) < std::make_pair(-b->job().spec().priority(), b->submit_order());
  });
  std::vector<QueueDecision> decisions;
  std::string head;  // the job whose turn it is
  int position = 0;
  for (const v1::JobRecord* record : queued) {
    QueueDecision decision;
    decision.job_id = record->job().id();
    const int64_t wait_ms = record->retry().not_before_unix_ms() - now_unix_ms;
    if (wait_ms > 0) {
      decision.position = ++position;
      decision.reason = MakeReason("BACKOFF", absl::StrCat("waits before restart ", record->job().status().restarts(), "; position ", position));
    } else if (!head.empty()) {
      decision.position = ++position;
      decision.reason = MakeReason("QUEUED", absl::StrCat("waits behind ", head, "; ", Devices(static_cast<int>(free.size())), " free; position ", position));
    } else if (PlanAttempt now = plan(*record, free); now.plan.has_value()) {
      decision.reason = MakeReason("PLANNED", now.plan->explanation());
      TakeDevices(*now.plan, free);
      decision.plan = std::move(now.plan);
    } else if (const PlanAttempt later = plan(*record, all); later.plan.has_value()) {
      head = decision.job_id;
      decision.position = ++position;
      const int needed = std::max({now.devices_needed, later.devices_needed, 1});
      decision.reason = MakeReason("QUEUED", absl::StrCat("waits for ", Devices(needed), ", ", free.size(), " free; position ", position));
    } else {
      decision.position = ++position;
      const int needed = std::max(later.devices_needed, 1);
      const bool too_few = needed > static_cast<int>(all.size());
      decision.reason = MakeReason(
          "NO_CAPACITY",
          too_few ? absl::StrCat("needs ", Devices(needed), ", the cluster has ", all.size(), "; position ", position)
                  : absl::StrCat(later.message, "; position ", position),
          too_few ? "start more workers, or lower parallel.pipeline_parallel_size or parallel.data_parallel_size" : "start larger workers, or change the job");
    }
    decisions.push_back(std::move(decision));
  }
  return decisions;
}

}  // namespace ppft::coordinator
