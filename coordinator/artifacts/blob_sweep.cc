#include "coordinator/artifacts/blob_sweep.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/logging.h"
#include "common/base/status.h"

namespace ppft::coordinator {
namespace {

constexpr size_t kPerTransaction = 200;  // other work of the controller comes in between

absl::Status DropUnusedRows(Controller& controller, absl::Time before) {
  return controller.Run([before](JobStore& store) -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> unused, store.ListUnusedBlobs(before));
    for (const std::string& sha256 : unused) PPFT_RETURN_IF_ERROR(store.DeleteBlob(sha256));
    return absl::OkStatus();
  });
}

}  // namespace

absl::StatusOr<int> SweepBlobs(BlobStore& blobs, Controller& controller, absl::Time before, absl::Time rows_before) {
  PPFT_RETURN_IF_ERROR(DropUnusedRows(controller, rows_before));
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> old, blobs.ListOlderThan(before));
  int removed = 0;
  for (size_t begin = 0; begin < old.size(); begin += kPerTransaction) {
    const std::vector<std::string> some(old.begin() + static_cast<std::ptrdiff_t>(begin),
                                        old.begin() + static_cast<std::ptrdiff_t>(std::min(old.size(), begin + kPerTransaction)));
    PPFT_ASSIGN_OR_RETURN(const int here, controller.Run([&blobs, some, before](JobStore& store) -> absl::StatusOr<int> {
      int gone = 0;
      for (const std::string& sha256 : some) {
        PPFT_ASSIGN_OR_RETURN(const std::optional<BlobRow> row, store.GetBlob(sha256));
        PPFT_ASSIGN_OR_RETURN(const bool referenced, store.IsReferenced(sha256));
        if (row.has_value() || referenced || !blobs.IsOlderThan(sha256, before)) continue;
        PPFT_RETURN_IF_ERROR(blobs.Delete(sha256));
        ++gone;
      }
      return gone;
    }));
    removed += here;
  }
  return removed;
}

BlobSweep::BlobSweep(BlobStore* blobs, Controller* controller, SweepLimits limits) : blobs_(blobs), controller_(controller), limits_(limits) {
  thread_ = std::thread([this] { Run(); });
}

BlobSweep::~BlobSweep() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void BlobSweep::Run() {
  Sweep(blobs_->open_time());
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, absl::ToChronoNanoseconds(limits_.interval), [this] { return stopping_; })) {
    lock.unlock();
    Sweep(absl::Now() - limits_.unnamed);
    lock.lock();
  }
}

void BlobSweep::Sweep(absl::Time before) {
  blobs_->DropOldPartials();
  const absl::StatusOr<int> removed = SweepBlobs(*blobs_, *controller_, before, absl::Now() - limits_.unused);
  if (!removed.ok()) LogWarning("files that nothing names stay for now: ", std::string(removed.status().message()));
  if (removed.ok() && *removed > 0) LogInfo("removed ", *removed, " files that nothing names");
}

}  // namespace ppft::coordinator
