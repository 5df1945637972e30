#include "worker/trainer/model/captured_passes.h"

#include <c10/util/Exception.h>

#include <exception>

namespace ppft::trainer {
namespace {

// Before a capture: the first time makes plans and loads kernels, the second finds the buffers where they stay.
constexpr int kTimesBefore = 2;
constexpr size_t kMostCaptured = 96;
constexpr size_t kMostEntries = 1024;

}  // namespace

absl::Status CapturedPasses::Run(const PassKey& key, int64_t generation, const std::function<absl::Status()>& pass, const std::function<int64_t()>& after) {
  if (!enabled_) return pass();
  if (generation != generation_ || captured_ > kMostCaptured || entries_.size() > kMostEntries) {
    Clear();
    generation_ = generation;
  }
  Entry& entry = entries_[key];
  if (entry.work != nullptr) return Launch(*entry.work);
  if (entry.done < kTimesBefore) {
    const absl::Status status = pass();
    if (after() == generation) ++entry.done;
    return status;
  }
  absl::Status status;
  try {
    entry.work = kernels_.Capture([&] { status = pass(); });
  } catch (const std::exception& e) {
    TORCH_WARN("passes are not captured from here on: ", e.what());
    entry.work = nullptr;
  }
  if (entry.work == nullptr || !status.ok() || after() != generation) {
    enabled_ = false;
    entries_.clear();
    return pass();
  }
  ++captured_;
  return Launch(*entry.work);
}

void CapturedPasses::Clear() {
  entries_.clear();
  captured_ = 0;
}

absl::Status CapturedPasses::Launch(CapturedWork& work) {
  work.Launch();
  ++launches_;
  return absl::OkStatus();
}

}  // namespace ppft::trainer
