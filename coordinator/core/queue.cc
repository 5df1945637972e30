#include "coordinator/core/queue.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "common/base/format.h"
#include "coordinator/core/job_state.h"
#include "coordinator/core/retry.h"

namespace ppft::coordinator {
namespace {

void TakeDevices(const v1::Plan& plan, std::vector<OfferedDevice>& free) {
  for (const v1::RankPlan& rank : plan.ranks()) {
    free.erase(std::remove_if(free.begin(), free.end(),
                              [&](const OfferedDevice& device) { return device.worker == rank.worker() && device.device.id() == rank.device(); }),
               free.end());
  }
}

template <typename Predicate>
std::vector<OfferedDevice> Those(const std::vector<OfferedDevice>& devices, const Predicate& predicate) {
  std::vector<OfferedDevice> matching;
  std::copy_if(devices.begin(), devices.end(), std::back_inserter(matching), predicate);
  return matching;
}

std::vector<OfferedDevice> Without(const std::vector<OfferedDevice>& devices, const std::vector<std::string>& workers) {
  std::vector<OfferedDevice> left;
  for (const OfferedDevice& device : devices) {
    if (std::find(workers.begin(), workers.end(), device.worker) == workers.end()) left.push_back(device);
  }
  return left;
}

std::vector<OfferedDevice> OfKind(const std::vector<OfferedDevice>& devices, const std::string& kind) {
  return Those(devices, [&](const OfferedDevice& device) { return device.device.kind() == kind; });
}

bool RanOnCuda(const v1::JobRecord& record) {
  return std::any_of(record.plan().ranks().begin(), record.plan().ranks().end(),
                     [](const v1::RankPlan& rank) { return absl::StartsWith(rank.device(), "cuda:"); });
}

// The kind as messages name it: not at all in a cluster without GPUs.
std::string ShownKind(const std::string& kind, const std::vector<OfferedDevice>& cluster) {
  return kind == "cuda" || !OfKind(cluster, "cuda").empty() ? kind : "";
}

std::string Devices(int count, const std::string& shown) { return absl::StrCat(count, shown.empty() ? "" : " ", shown, count == 1 ? " device" : " devices"); }

// Unknown memory counts as enough.
int64_t MemoryOf(const OfferedDevice& device) { return device.device.memory_bytes() > 0 ? device.device.memory_bytes() : INT64_MAX; }

// The least that the job needs of `all`, on which `whole` is a plan: as many devices with so much memory. The planner spends more where it may: it merges
// micro-batches or recomputes less on larger devices.
struct Need {
  int devices = 0;
  int64_t memory_bytes = 0;  // of the smallest device that can be one of them; what a rank takes if that is not known
};

Need LeastNeed(const v1::JobRecord& record, const std::vector<OfferedDevice>& all, const std::string& kind, const PlanFunction& plan, PlanAttempt whole) {
  std::set<int64_t> sizes;
  for (const OfferedDevice& device : all) sizes.insert(MemoryOf(device));
  const std::vector<int64_t> ascending(sizes.begin(), sizes.end());
  // The first size such that the devices of up to it suffice.
  size_t low = 0, high = ascending.empty() ? 0 : ascending.size() - 1;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    PlanAttempt attempt = plan(record, Those(all, [&](const OfferedDevice& device) { return MemoryOf(device) <= ascending[middle]; }), kind);
    if (attempt.plan.has_value()) {
      whole = std::move(attempt);
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  int64_t bytes = 0;
  for (const v1::RankPlan& rank : whole.plan->ranks()) bytes = std::max(bytes, rank.peak_bytes());
  const auto smallest = std::lower_bound(ascending.begin(), ascending.end(), bytes);
  return {std::max(whole.devices_needed, 1), smallest == ascending.end() || *smallest == INT64_MAX ? bytes : *smallest};
}

// "waits for 2 devices, 1 free", of those that the job could take: "waits for 1 cuda device of 79.6 GiB or more, 0 of 1 such free (3 are too small)". Beside
// those that are leased where there may be free devices that the job does not take.
std::string WaitsText(const Need& need, const std::vector<OfferedDevice>& free, const std::vector<OfferedDevice>& all, const std::string& shown) {
  const auto large = [&](const OfferedDevice& device) { return MemoryOf(device) >= need.memory_bytes; };
  const size_t usable = Those(all, large).size(), too_small = all.size() - usable, usable_free = Those(free, large).size();
  std::string text = absl::StrCat("waits for ", Devices(need.devices, shown));
  if (too_small > 0) absl::StrAppend(&text, " of ", FormatBytes(need.memory_bytes), " or more", need.devices > 1 ? " each" : "");
  absl::StrAppend(&text, ", ", usable_free, shown.empty() && too_small == 0 ? "" : absl::StrCat(" of ", usable), too_small > 0 ? " such" : "", " free");
  if (too_small > 0) absl::StrAppend(&text, " (", too_small, too_small == 1 ? " is" : " are", " too small)");
  return text;
}

std::string TimeText(int64_t unix_ms) { return absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", absl::FromUnixMillis(unix_ms), absl::UTCTimeZone()); }

// "; gpu-1 with 2 (since …) is away: jobs wait for it until … before they take CPU slots". `may_change`: the job may take them then.
std::string AwayText(const std::vector<AwayGpus>& away, bool may_change) {
  if (away.empty()) return "";
  std::vector<std::string> workers;
  int64_t until_ms = 0;
  for (const AwayGpus& gpus : away) {
    workers.push_back(
        absl::StrCat(gpus.worker, " with ", gpus.count, gpus.since_unix_ms > 0 ? absl::StrCat(" (since ", TimeText(gpus.since_unix_ms), ")") : ""));
    until_ms = std::max(until_ms, gpus.until_unix_ms);
  }
  const bool one = workers.size() == 1;
  return absl::StrCat(
      "; ", absl::StrJoin(workers, ", "), one ? " is away" : " are away",
      may_change && until_ms > 0 ? absl::StrCat(": jobs wait for ", one ? "it" : "them", " until ", TimeText(until_ms), " before they take CPU slots") : "");
}

// What to do about a job that the devices of the cluster cannot take.
std::string CapacityRemedy(bool too_few, const std::string& kind, const std::vector<AwayGpus>& away, bool may_change) {
  std::string remedy = !too_few         ? "start larger workers, or change the job"
                       : kind == "cuda" ? "start more workers with GPUs, or lower parallel.pipeline_parallel_size or parallel.data_parallel_size"
                                        : "start more workers, or lower parallel.pipeline_parallel_size or parallel.data_parallel_size";
  if (away.empty()) return remedy;
  return absl::StrCat("bring ", away[0].worker, " back (ppctl workers list shows its state), ", remedy,
                      may_change ? "; the coordinator's --gpu_wait says how long jobs wait for GPUs that are away" : "");
}

// Starts the job, or says why it waits: QUEUED if it could be laid on all devices, NO_CAPACITY if not even there. `free`, `all`: those of `kind`.
// `shown`: ShownKind. `away`: of that kind. `position`: of the one before it.
void Place(const v1::JobRecord& record, const std::vector<OfferedDevice>& free, const std::vector<OfferedDevice>& all, const std::string& kind,
           const std::string& shown, const std::vector<AwayGpus>& away, const PlanFunction& plan, int position, QueueDecision& decision) {
  std::vector<std::string> excluded;  // of those that are there
  for (const std::string& worker : ExcludedWorkers(record.retry())) {
    if (std::any_of(all.begin(), all.end(), [&](const OfferedDevice& device) { return device.worker == worker; })) excluded.push_back(worker);
  }
  std::string note;
  PlanAttempt now = plan(record, Without(free, excluded), kind), later;
  if (!now.plan.has_value()) later = plan(record, Without(all, excluded), kind);
  const bool elsewhere = now.plan.has_value() || later.plan.has_value();
  if (!excluded.empty()) {
    note = absl::StrCat("; ", absl::StrJoin(excluded, ", "), " failed this job twice",
                        elsewhere ? " and is left out" : ", but the other workers cannot take it, so it is used again");
    if (!elsewhere) {
      now = plan(record, free, kind);
      if (!now.plan.has_value()) later = plan(record, all, kind);
    }
  }
  if (now.plan.has_value()) {
    decision.reason = MakeReason("PLANNED", absl::StrCat(now.plan->explanation(), note));
    decision.plan = std::move(now.plan);
    return;
  }
  decision.position = position + 1;
  if (later.plan.has_value()) {
    const std::vector<std::string> left_out = elsewhere ? excluded : std::vector<std::string>();
    const std::vector<OfferedDevice> usable = Without(all, left_out);
    const Need need = LeastNeed(record, usable, kind, plan, std::move(later));
    decision.reason = MakeReason("QUEUED", absl::StrCat(WaitsText(need, Without(free, left_out), usable, shown), "; position ", decision.position, note));
    return;
  }
  const int needed = std::max(later.devices_needed, 1);
  const bool too_few = needed > static_cast<int>(all.size());
  const bool as_before = shown == "cpu" || (all.empty() && RanOnCuda(record));  // another kind is not taken
  const bool may_change = all.empty() && !as_before;
  decision.reason = MakeReason(
      "NO_CAPACITY",
      absl::StrCat(too_few ? absl::StrCat("needs ", Devices(needed, shown), as_before ? " as before" : "", ", the cluster has ", all.size()) : later.message,
                   AwayText(away, may_change), "; position ", decision.position),
      CapacityRemedy(too_few, kind, away, may_change));
}

}  // namespace

std::string KindFor(const v1::JobRecord& record, const std::vector<OfferedDevice>& all, bool gpus_away) {
  if (RanOnCuda(record)) return "cuda";
  const bool has_gpus = !OfKind(all, "cuda").empty(), ran_on_cpu = !record.plan().ranks().empty();
  if (ran_on_cpu) return has_gpus && OfKind(all, "cpu").empty() ? "cuda" : "cpu";
  return has_gpus || gpus_away ? "cuda" : "cpu";
}

std::vector<QueueDecision> DecideQueue(std::vector<const v1::JobRecord*> queued, std::vector<OfferedDevice> free, const std::vector<OfferedDevice>& all,
                                       const std::vector<AwayGpus>& away, const PlanFunction& plan, int64_t now_unix_ms) {
  std::stable_sort(queued.begin(), queued.end(), [](const v1::JobRecord* a, const v1::JobRecord* b) {
    return std::make_pair(-a->job().spec().priority(), a->submit_order()) < std::make_pair(-b->job().spec().priority(), b->submit_order());
  });
  std::vector<QueueDecision> decisions;
  std::string head;  // the job whose turn it is
  int position = 0;
  for (const v1::JobRecord* record : queued) {
    QueueDecision decision;
    decision.job_id = record->job().id();
    const std::string kind = KindFor(*record, all, !away.empty()), shown = ShownKind(kind, all);
    const std::vector<OfferedDevice> free_of_kind = OfKind(free, kind), all_of_kind = OfKind(all, kind);
    const int64_t wait_ms = record->retry().not_before_unix_ms() - now_unix_ms;
    if (wait_ms > 0) {
      decision.position = ++position;
      decision.reason = MakeReason("BACKOFF", absl::StrCat("waits before restart ", record->job().status().restarts(), "; position ", position));
    } else if (!head.empty()) {
      decision.position = ++position;
      decision.reason =
          MakeReason("QUEUED", absl::StrCat("waits behind ", head, "; ", Devices(static_cast<int>(free_of_kind.size()), shown), " free; position ", position));
    } else {
      Place(*record, free_of_kind, all_of_kind, kind, shown, kind == "cuda" ? away : std::vector<AwayGpus>(), plan, position, decision);
      if (decision.plan.has_value()) {
        TakeDevices(*decision.plan, free);
      } else {
        ++position;
        if (decision.reason.code() == "QUEUED") head = decision.job_id;
      }
    }
    decisions.push_back(std::move(decision));
  }
  return decisions;
}

}  // namespace ppft::coordinator
