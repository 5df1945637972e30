#include "worker/agent/offer.h"

#include <signal.h>

#include <atomic>
#include <ctime>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/logging.h"
#include "common/base/process.h"
#include "common/base/status.h"
#include "worker/agent/cuda_devices.h"
#include "worker/agent/devices.h"

namespace ppft::agent {
namespace {

// Less than a trainer takes before it holds any layer: LibTorch alone, or CUDA's own context.
constexpr int64_t kLeastSlotBytes = int64_t{512} << 20;
constexpr int64_t kLeastGpuBytes = int64_t{2} << 30;

void CheckMemory(HostOffer* offer) {
  for (const v1::Device& device : offer->devices) {
    const bool gpu = device.kind() == "cuda";
    const int64_t least = gpu ? kLeastGpuBytes : kLeastSlotBytes;
    if (device.memory_bytes() >= least) continue;
    offer->problems.push_back(absl::StrFormat("%s has %d MiB of memory, a trainer needs at least %d: %s", device.id(), device.memory_bytes() >> 20, least >> 20,
                                              gpu ? "leave this GPU out of --devices" : "offer fewer slots with --devices cpu:N"));
  }
}

// Waits for a signal that ends the program; with a limit, false after it.
bool WaitForSignal(const sigset_t& signals, absl::Duration limit) {
  if (limit == absl::InfiniteDuration()) {
    int received = 0;
    sigwait(&signals, &received);
    return true;
  }
  const timespec time = absl::ToTimespec(limit);
  return sigtimedwait(&signals, nullptr, &time) > 0;
}

}  // namespace

absl::StatusOr<HostOffer> OfferHost(const std::string& devices, int threads_per_slot, const std::string& trainer) {
  if (absl::StrContains(devices, "cpu:") && absl::StrContains(devices, "cuda:")) {
    return absl::InvalidArgumentError(absl::StrCat("--devices \"", devices,
                                                   "\" names CPU slots and GPUs, and a worker offers one kind: start one worker for each, with a --name and a "
                                                   "--work_dir of its own"));
  }
  HostOffer offer;
  absl::Status lacking;
  if (absl::StartsWith(devices, "cuda:")) {
    absl::StatusOr<CudaOffer> cuda = OfferCudaDevices(absl::string_view(devices).substr(5), trainer);
    lacking = cuda.status();
    if (cuda.ok()) {
      offer.devices = std::move(cuda->devices);
      offer.environment = std::move(cuda->environment);
      offer.torch = cuda->torch;
      offer.nccl = cuda->nccl;
    }
  } else {
    PPFT_ASSIGN_OR_RETURN(std::vector<v1::Device> slots, OfferDevices(devices, threads_per_slot));
    absl::StatusOr<TorchOffer> torch = FindTorch(trainer);
    lacking = torch.status();
    if (torch.ok()) {
      offer.devices = std::move(slots);
      offer.environment = std::move(torch->environment);
      offer.torch = torch->torch;
    }
  }
  if (absl::IsInvalidArgument(lacking)) return lacking;
  if (!lacking.ok()) offer.problems.push_back(std::string(lacking.message()));
  CheckMemory(&offer);
  return offer;
}

absl::Status ServeOffer(const AgentOptions& options, HostOffer offer, metrics::WorkerMetrics* metrics, absl::Duration look_again,
                        const std::function<absl::StatusOr<HostOffer>()>& look) {
  const sigset_t signals = StopSignals();
  while (true) {
    AgentOptions now = options;
    now.devices = offer.devices;
    now.trainer_environment.insert(now.trainer_environment.begin(), offer.environment.begin(), offer.environment.end());
    now.host.set_torch(offer.torch);
    now.host.set_nccl(offer.nccl);
    now.problems = offer.problems;
    for (const std::string& problem : offer.problems) LogError(problem);
    if (offer.devices.empty())
      LogError("no device to offer: connected all the same, `ppctl workers list` shows why; looking again every ", absl::FormatDuration(look_again));
    Agent agent(now, metrics);
    std::atomic<bool> better = false;
    std::atomic<bool> ended = false;
    HostOffer next;
    std::thread waiter([&] {
      while (!WaitForSignal(signals, offer.devices.empty() ? look_again : absl::InfiniteDuration())) {
        if (ended) return;
        absl::StatusOr<HostOffer> found = look();
        if (!found.ok() || found->devices.empty()) continue;
        next = *std::move(found);
        better = true;
        break;
      }
      if (!better) ShowStopping();
      agent.Shutdown();
    });
    const absl::Status status = agent.Run();
    ended = true;
    if (!better) pthread_kill(waiter.native_handle(), SIGTERM);  // where Run failed by itself
    waiter.join();
    if (!status.ok() || !better) return status;
    offer = std::move(next);
  }
}

}  // namespace ppft::agent
