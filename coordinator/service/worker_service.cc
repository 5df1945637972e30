#include "coordinator/service/worker_service.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/time/clock.h"
#include "common/net/status.h"

namespace ppft::coordinator {
namespace {

// Messages of one worker that wait for the controller; above this its stream is not read.
constexpr int kMaxWaiting = 256;

class WorkerStream;

// The controller's end of a stream; outlives it.
class StreamLink : public WorkerLink {
 public:
  void Send(v1::CoordinatorMessage message) override;
  void Close(absl::Status status) override;
  void MessageDone();

  std::mutex mutex_;
  WorkerStream* stream_ = nullptr;  // guarded by mutex_; nullptr after the stream's end
};

class WorkerStream : public grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage> {
 public:
  explicit WorkerStream(JobController* controller) : controller_(controller), link_(std::make_shared<StreamLink>()) {
    std::lock_guard<std::mutex> lock(link_->mutex_);
    link_->stream_ = this;
    StartRead(&incoming_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      controller_->Post([link = link_, controller = controller_](JobStore&) {
        controller->OnWorkerClosed(link);
        return absl::OkStatus();
      });
      std::lock_guard<std::mutex> lock(link_->mutex_);
      // Unless the worker has gone: then nobody hears it.
      return EndLocked(absl::InvalidArgumentError("a message could not be read: it is malformed or too large"));
    }
    v1::CoordinatorMessage clock;
    if (incoming_.heartbeat().sent_unix_nanos() != 0) {
      clock.mutable_clock()->set_sent_unix_nanos(incoming_.heartbeat().sent_unix_nanos());
      clock.mutable_clock()->set_received_unix_nanos(absl::GetCurrentTimeNanos());
    }
    Deliver(std::move(incoming_));
    incoming_.Clear();
    std::lock_guard<std::mutex> lock(link_->mutex_);
    if (clock.has_clock()) {
      clock.mutable_clock()->set_answered_unix_nanos(absl::GetCurrentTimeNanos());
      SendLocked(std::move(clock));
    }
    if (++waiting_ < kMaxWaiting) {
      StartRead(&incoming_);
    } else {
      paused_ = true;
    }
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(link_->mutex_);
    writing_ = false;
    if (!ok) outgoing_.clear();
    PumpLocked();
  }

  void OnDone() override {
    {
      std::lock_guard<std::mutex> lock(link_->mutex_);
      link_->stream_ = nullptr;
    }
    delete this;
  }

  // With link_->mutex_ held.
  void SendLocked(v1::CoordinatorMessage message) {
    if (ending_) return;
    outgoing_.push_back(std::move(message));
    PumpLocked();
  }
  void EndLocked(const absl::Status& status) {
    if (ending_) return;
    ending_ = true;
    end_status_ = status;
    outgoing_.clear();
    PumpLocked();
  }
  void MessageDoneLocked() {
    --waiting_;
    if (!paused_ || waiting_ >= kMaxWaiting / 2) return;
    paused_ = false;
    StartRead(&incoming_);
  }

 private:
  void Deliver(v1::WorkerMessage message) {
    const bool first = !std::exchange(said_hello_, true);
    controller_->Post(
        [controller = controller_, link = link_, first, message = std::move(message)](JobStore&) -> absl::Status {
          if (first != message.has_hello()) return absl::InvalidArgumentError("the first message of Connect, and only the first, is hello");
          return first ? controller->OnHello(link, message.hello()) : controller->OnWorkerMessage(link, message);
        },
        [link = link_](absl::Status status) {
          if (!status.ok()) link->Close(status);
          link->MessageDone();
        });
  }

  void PumpLocked() {
    if (writing_ || finished_) return;
    if (ending_) {
      finished_ = true;
      Finish(net::ToGrpcStatus(end_status_));
      return;
    }
    if (outgoing_.empty()) return;
    current_ = std::move(outgoing_.front());
    outgoing_.pop_front();
    writing_ = true;
    StartWrite(&current_);
  }

  JobController* const controller_;
  const std::shared_ptr<StreamLink> link_;
  v1::WorkerMessage incoming_;  // being read
  bool said_hello_ = false;     // one read at a time

  // Guarded by link_->mutex_.
  std::deque<v1::CoordinatorMessage> outgoing_;
  v1::CoordinatorMessage current_;  // being written
  int waiting_ = 0;                 // messages with the controller
  bool paused_ = false;
  bool writing_ = false;
  bool ending_ = false;
  bool finished_ = false;
  absl::Status end_status_;
};

void StreamLink::Send(v1::CoordinatorMessage message) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stream_ != nullptr) stream_->SendLocked(std::move(message));
}

void StreamLink::Close(absl::Status status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stream_ != nullptr) stream_->EndLocked(status);
}

void StreamLink::MessageDone() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stream_ != nullptr) stream_->MessageDoneLocked();
}

}  // namespace

grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* WorkerServiceImpl::Connect(grpc::CallbackServerContext* context) {
  return new WorkerStream(controller_);
}

}  // namespace ppft::coordinator
