#include "coordinator/core/planner/placement.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace ppft::coordinator {
namespace {

// Free devices by worker name, each list in order.
using FreeDevices = std::map<std::string, std::vector<PlanDevice>>;

void Take(FreeDevices& free, const std::string& worker, size_t count, std::vector<PlanDevice>& chosen) {
  std::vector<PlanDevice>& list = free[worker];
  chosen.insert(chosen.end(), list.begin(), list.begin() + count);
  list.erase(list.begin(), list.begin() + count);
}

// From the worker with the least room that has `count`; false if none has.
bool TakeFromOneWorker(FreeDevices& free, size_t count, std::vector<PlanDevice>& chosen) {
  const std::string* best = nullptr;
  size_t least = 0;
  for (const auto& [worker, list] : free) {
    if (list.size() < count || (best != nullptr && list.size() >= least)) continue;
    best = &worker;
    least = list.size();
  }
  if (best == nullptr) return false;
  Take(free, *best, count, chosen);
  return true;
}

// From as few workers as possible. There must be `count` in all.
void TakeSpread(FreeDevices& free, size_t count, std::vector<PlanDevice>& chosen) {
  while (count > 0) {
    const auto most =
        std::max_element(free.begin(), free.end(), [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });  // the first by name
    const size_t taken = std::min(count, most->second.size());
    Take(free, most->first, taken, chosen);
    count -= taken;
  }
}

}  // namespace

std::vector<PlanDevice> Sorted(std::vector<PlanDevice> devices) {
  std::sort(devices.begin(), devices.end(), [](const PlanDevice& a, const PlanDevice& b) {
    return std::make_tuple(a.worker, a.id.size(), a.id) < std::make_tuple(b.worker, b.id.size(), b.id);
  });
  return devices;
}

std::vector<PlanDevice> ChooseDevices(const std::vector<PlanDevice>& devices, int data_parallel_size, int pipeline_size) {
  const size_t needed = static_cast<size_t>(data_parallel_size) * pipeline_size;
  std::vector<PlanDevice> chosen;
  if (devices.size() < needed) return chosen;
  FreeDevices free;
  for (const PlanDevice& device : Sorted(devices)) free[device.worker].push_back(device);
  if (TakeFromOneWorker(free, needed, chosen)) return chosen;
  for (int replica = 0; replica < data_parallel_size; ++replica) {
    if (!TakeFromOneWorker(free, pipeline_size, chosen)) TakeSpread(free, pipeline_size, chosen);
  }
  return chosen;
}

}  // namespace ppft::coordinator
