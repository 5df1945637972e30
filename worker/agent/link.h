// The stream to the coordinator: hello, heartbeats and reports out; welcome, directives and acknowledgements in. Reconnects for ever, but to a
// coordinator of another version.
//
// Thread: own; callbacks run on it and must not block for long.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "ppft/v1/worker.grpc.pb.h"
#include "worker/agent/clock_offset.h"
#include "worker/agent/report_queue.h"

namespace ppft::agent {

struct LinkCallbacks {
  std::function<v1::WorkerHello()> hello;    // of now: the ranks that live
  std::function<v1::Heartbeat()> heartbeat;  // of now, without revision and clock
  std::function<void(const v1::Directive&)> on_directive;
  std::function<void(bool)> on_connected;
  std::function<void()> on_name_taken;                  // another agent has this worker's name: no rank of this one is wanted
  std::function<void(const absl::Status&)> on_refused;  // for good; the link does not try again
};

class Link {
 public:
  Link(std::shared_ptr<grpc::Channel> channel, std::string coordinator, ReportQueue* reports, LinkCallbacks callbacks);
  ~Link();

  void Start();
  // Something is to be sent: a report, or a heartbeat because a rank ended.
  void Wake(bool heartbeat);
  // Waits until every report is acknowledged or the time is over.
  void Flush(absl::Duration timeout);

 private:
  using Stream = grpc::ClientReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>;

  void Run();
  absl::Status Serve();
  void Write(Stream* stream, int64_t acked, absl::Duration interval);
  bool WriteHeartbeat(Stream* stream);
  // A report that breaks every stream that carries it must not be sent for ever.
  void JudgeOldestReport(const absl::Status& end);

  const std::shared_ptr<grpc::Channel> channel_;
  const std::string coordinator_;
  const std::unique_ptr<v1::WorkerService::Stub> stub_;
  ReportQueue* const reports_;
  const LinkCallbacks callbacks_;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;                   // guarded by mutex_
  bool stream_broken_ = false;              // guarded by mutex_
  bool heartbeat_due_ = false;              // guarded by mutex_
  bool reports_due_ = false;                // guarded by mutex_
  grpc::ClientContext* context_ = nullptr;  // guarded by mutex_; of the live stream
  ClockOffsetEstimate clock_;               // guarded by mutex_
  std::atomic<int64_t> applied_revision_ = 0;
  std::atomic<int64_t> sent_seq_ = 0;  // newest report written to the last stream
  // Own thread only.
  bool welcomed_ = false;     // the last stream came to life
  int64_t suspect_seq_ = 0;   // the oldest report when a stream was refused
  int suspect_refusals_ = 0;  // in a row
  std::thread thread_;
};

}  // namespace ppft::agent
