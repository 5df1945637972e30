// BlobSweep: removes files that no row will ever name: what a crash between a file and its row left, what an attempt that was given up had uploaded, and
// uploads that never became a dataset, a model or an adapter. Never a blob in use: rows and references are asked on the controller's thread, where the file
// goes too, and whoever finds an old blob there to use it makes it young first (BlobStore).
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/controller.h"

namespace ppft::coordinator {

struct SweepLimits {
  absl::Duration unnamed = absl::Hours(1);  // a blob without row and reference that nobody touched for so long goes
  absl::Duration unused = absl::Hours(24);  // so does the row of one that nothing ever referred to: its file follows in the next sweep
  absl::Duration interval = absl::Minutes(30);
};

// One sweep; the number of files that went. `before`: only files last touched before. Blocks: not on the controller's thread.
absl::StatusOr<int> SweepBlobs(BlobStore& blobs, Controller& controller, absl::Time before, absl::Time rows_before);

// Sweeps at once what was there before the blob store was opened, then in the background.
class BlobSweep {
 public:
  // Both outlive it.
  BlobSweep(BlobStore* blobs, Controller* controller, SweepLimits limits);
  ~BlobSweep();

 private:
  void Run();
  void Sweep(absl::Time before);

  BlobStore* const blobs_;
  Controller* const controller_;
  const SweepLimits limits_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace ppft::coordinator
