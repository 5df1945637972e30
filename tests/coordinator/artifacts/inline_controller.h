// A controller for tests: one transaction per post on a real SQLite store, on the caller's thread; epochs are answered from a table.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "coordinator/controller.h"
#include "coordinator/store/sqlite_job_store.h"

namespace ppft::coordinator {

class InlineController : public Controller {
 public:
  explicit InlineController(std::unique_ptr<JobStore> store) : store_(std::move(store)) {}

  using Controller::Post;
  void Post(Body body, Done done) override {
    absl::Status status;
    {
      absl::MutexLock lock(&mutex_);
      status = store_->Begin();
      if (status.ok()) status = body(*store_);
      if (status.ok()) {
        status = store_->Commit();
      } else {
        store_->Rollback();
      }
    }
    done(status);
  }
  void Work(absl::AnyInvocable<void()> work) override { work(); }
  absl::Status CheckEpoch(const v1::RankKey& rank) override {
    absl::MutexLock lock(&mutex_);
    const auto found = epochs_.find(rank.job_id());
    if (found == epochs_.end()) return absl::NotFoundError("no such job");
    if (found->second != rank.epoch()) return absl::FailedPreconditionError(absl::StrCat("STALE_EPOCH: ", rank.epoch(), " is not ", found->second));
    return absl::OkStatus();
  }
  void ReportDiskFull(const v1::RankKey& rank, int64_t needed_bytes, const std::string& message) override {
    absl::MutexLock lock(&mutex_);
    disk_full_ = absl::StrCat(rank.job_id(), " needs ", needed_bytes, ": ", message);
  }
  std::string disk_full() {
    absl::MutexLock lock(&mutex_);
    return disk_full_;
  }
  void SetEpoch(const std::string& job, int64_t epoch) {
    absl::MutexLock lock(&mutex_);
    epochs_[job] = epoch;
  }

 private:
  absl::Mutex mutex_;
  std::unique_ptr<JobStore> store_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, int64_t> epochs_ ABSL_GUARDED_BY(mutex_);
  std::string disk_full_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace ppft::coordinator
