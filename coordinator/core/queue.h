// Who starts next: priority, then first come. PURE.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "ppft/v1/cluster.pb.h"
#include "ppft/v1/plan.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// A device that a job may be laid on.
struct OfferedDevice {
  std::string worker;
  v1::Device device;
};

// GPUs of a worker that is lost, or that has connected again without them because of a problem of its host. They may be back in a moment.
struct AwayGpus {
  std::string worker;
  int count = 0;
  int64_t since_unix_ms = 0;  // 0: not seen since the coordinator's start, which is not long ago
  int64_t until_unix_ms = 0;  // they are waited for; 0 with since_unix_ms
};

// The planner's answer for one job on some devices.
struct PlanAttempt {
  std::optional<v1::Plan> plan;
  int devices_needed = 0;  // at least this many; 0 = unknown
  std::string message;     // why there is no plan
};
// `devices` are all of `kind`; there may be none.
using PlanFunction = std::function<PlanAttempt(const v1::JobRecord&, const std::vector<OfferedDevice>& devices, const std::string& kind)>;

// cuda | cpu: the kind of device that the job runs on. A job that was never laid out takes CUDA devices if one of `all` is such, leased or not, or if some are
// away (gpus_away): it would run a thousand times slower on CPU slots, and stay there. One that was laid out keeps the kind of its newest plan, and with it its
// precision: what ran on CUDA devices waits for them rather than to go on a thousand times slower; what ran on CPU slots stays there as long as there are any,
// also beside CUDA devices that came later and may be too few for it.
std::string KindFor(const v1::JobRecord& record, const std::vector<OfferedDevice>& all, bool gpus_away);

struct QueueDecision {
  std::string job_id;
  std::optional<v1::Plan> plan;  // start with it; unset: wait
  v1::Reason reason;             // why it waits; why this plan
  int position = 0;              // among those that wait, from 1
};

// Goes through the queued jobs by (priority descending, submit_order). A job starts if it can be laid on the devices that are free. If it
// cannot, but could on all devices of the cluster, it is the head that waits, and nobody behind it starts: devices that become free are its
// own. Devices are those of the job's kind (KindFor). If even the whole cluster is too small, it waits with NO_CAPACITY and lets others pass, as does one whose
// backoff is not over. A job keeps away from its excluded workers (retry.h) as long as it could be laid on the others; if it could not, it takes them and says
// so. GPUs that are away decide about the kind alone: they hold no turn.
std::vector<QueueDecision> DecideQueue(std::vector<const v1::JobRecord*> queued, std::vector<OfferedDevice> free, const std::vector<OfferedDevice>& all,
                                       const std::vector<AwayGpus>& away, const PlanFunction& plan, int64_t now_unix_ms);

}  // namespace ppft::coordinator
