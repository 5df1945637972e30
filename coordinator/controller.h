// Controller: the one writer. It owns the JobStore and the state of jobs and workers on its own thread: event -> core -> persist -> act.
//
// Whoever wants something read or changed posts a function. All functions that wait are run in one transaction; when that is committed, and
// not before, each one's `done` is called. Slow work (hashing, ppft-prepare, assembling artifacts) runs on a thread pool (Work) and posts
// its result back.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "coordinator/core/disk.h"
#include "coordinator/store/job_store.h"
#include "ppft/v1/artifact.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// PREPARING: from datasets to token files.
struct PrepareInput {
  std::string job_id;
  v1::JobSpec spec;
  v1::ModelRecord model;
  std::vector<v1::Dataset> datasets;       // in the order of spec.data.datasets
  std::vector<v1::Dataset> test_datasets;  // in the order of spec.data.test_datasets
};

// EXPORTING: from the ranks' exports to artifacts.
struct AssembleInput {
  std::string job_id;
  v1::JobSpec spec;
  v1::ModelRecord model;
  v1::JobStatus status;
  std::vector<v1::ExportWritten> exports;  // of replica 0, in the order of pipeline ranks; their files are blobs
  std::vector<v1::MetricRow> metrics;      // the whole history, by step
};

// The slow work of a job, done by coordinator/artifacts on the pool's threads: thread-safe, without access to the store. Errors of the
// user are INVALID_ARGUMENT (the message names file and row); RESOURCE_EXHAUSTED is a full disk; everything else is tried again.
class JobWork {
 public:
  virtual ~JobWork() = default;
  // Idempotent. `cancelled` turns true when the result is no longer wanted.
  virtual absl::StatusOr<v1::PreparedData> Prepare(const PrepareInput& input, const std::function<bool()>& cancelled) = 0;
  // One manifest per format of spec.output; files are blobs, on disk and synced.
  virtual absl::StatusOr<std::vector<v1::ArtifactManifest>> Assemble(const AssembleInput& input) = 0;
  // Removes contents that no row names any more. Best effort; what is missing is fine.
  virtual void DeleteBlobs(const std::vector<std::string>& sha256s) = 0;
  // Reads them all. DATA_LOSS for the first that is damaged, NOT_FOUND for one that is lost; any other error says nothing about them.
  virtual absl::Status CheckBlobs(const std::vector<std::string>& sha256s) = 0;

  // The room on the disk of the data folder, with the ballast kept accordingly. These two are quick, and are called on the controller's thread.
  virtual DiskRoom LookAtDisk() = 0;
  // The store could not write: it gets the ballast's room.
  virtual void GiveUpBallast() = 0;
};

class Controller {
 public:
  // In a transaction, on the controller's thread. Must not block. An error undoes what the body wrote, and nothing else.
  using Body = absl::AnyInvocable<absl::Status(JobStore&)>;
  // After the commit, on the controller's thread, with the body's status or the commit's error. Must not block.
  using Done = absl::AnyInvocable<void(absl::Status)>;

  virtual ~Controller() = default;

  // From any thread. After the controller has stopped, done is called at once with UNAVAILABLE.
  virtual void Post(Body body, Done done) = 0;
  void Post(Body body) {
    Post(std::move(body), [](absl::Status) {});
  }

  // Runs `body` (JobStore& -> absl::Status or absl::StatusOr<T>) as Post does and waits for the commit. Never call it on the controller's
  // thread or in a callback of gRPC.
  template <typename F>
  std::invoke_result_t<F, JobStore&> Run(F body) {
    using Result = std::invoke_result_t<F, JobStore&>;
    struct Call {
      Result result = Result(absl::InternalError("the call did not run"));
      absl::Notification finished;
    };
    auto call = std::make_shared<Call>();
    Post(
        [call, body = std::move(body)](JobStore& store) mutable -> absl::Status {
          call->result = body(store);
          return StatusOf(call->result);
        },
        [call](absl::Status status) {
          if (!status.ok()) call->result = status;
          call->finished.Notify();
        });
    call->finished.WaitForNotification();
    return std::move(call->result);
  }

  // Runs `work` on the thread pool. It may block; it must end soon after Stop.
  virtual void Work(absl::AnyInvocable<void()> work) = 0;

  // OK if a rank with this key may still change something: the job's current epoch, in a state that has ranks. FAILED_PRECONDITION
  // "STALE_EPOCH…" otherwise (and counted), NOT_FOUND for an unknown job. From any thread; blocks like Run.
  virtual absl::Status CheckEpoch(const v1::RankKey& rank) = 0;

  // What this rank writes has no room: its job pauses until `needed_bytes` are free. From any thread.
  virtual void ReportDiskFull(const v1::RankKey& rank, int64_t needed_bytes, const std::string& message) = 0;

 private:
  static absl::Status StatusOf(const absl::Status& status) { return status; }
  template <typename T>
  static absl::Status StatusOf(const absl::StatusOr<T>& result) {
    return result.status();
  }
};

}  // namespace ppft::coordinator
