// One server stream that follows a job: it sends what is there, then waits until the controller says that something changed.
#pragma once

#include <grpcpp/grpcpp.h>

#include <deque>
#include <functional>
#include <string>
#include <utility>

#include "common/net/status.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {

// Makes itself, deletes itself. All members belong to the controller's thread; gRPC's callbacks only post. At most one batch of messages is
// held, so a slow reader costs nothing: it gets the newest state when it is ready for it.
template <typename Message>
class Feed : public grpc::ServerWriteReactor<Message> {
 public:
  // Appends what came after the cursor that it keeps; returns true if nothing will follow. Called on the controller's thread after a commit.
  using Fetch = std::function<absl::StatusOr<bool>(const v1::Job& job, std::deque<Message>* out)>;

  Feed(JobController* controller, std::string job, Fetch fetch) : controller_(controller), fetch_(std::move(fetch)) {
    Post([this, job = std::move(job)] { Open(job); });
  }

  void OnWriteDone(bool ok) override {
    Post([this, ok] {
      writing_ = false;
      cancelled_ = cancelled_ || !ok;
      Pump();
    });
  }
  void OnCancel() override {
    Post([this] {
      cancelled_ = true;
      Pump();
    });
  }
  void OnDone() override {
    Post([this] {
      if (subscription_ != 0) controller_->Unsubscribe(subscription_);
      delete this;
    });
  }

 private:
  void Post(std::function<void()> action) {
    controller_->Post([](JobStore&) { return absl::OkStatus(); },
                      [this, action = std::move(action)](absl::Status status) {
                        if (!status.ok()) broken_ = status;
                        action();
                      });
  }

  void Open(const std::string& id_or_name) {
    if (!broken_.ok()) return End(broken_);
    const auto job = controller_->FindJob(id_or_name);
    if (!job.ok()) return End(job.status());
    job_id_ = (*job)->id();
    subscription_ = controller_->Subscribe(job_id_, [this] { Pump(); });
    Pump();
  }

  void Pump() {
    if (ended_ || writing_) return;
    if (cancelled_) return End(absl::CancelledError("the caller went away"));
    if (!broken_.ok()) return End(broken_);
    bool last = false;
    if (waiting_.empty()) {
      const auto job = controller_->FindJob(job_id_);
      if (!job.ok()) return End(job.status());
      const absl::StatusOr<bool> fetched = fetch_(**job, &waiting_);
      if (!fetched.ok()) return End(fetched.status());
      last = *fetched;
    }
    if (waiting_.empty()) {
      if (last) End(absl::OkStatus());
      return;
    }
    current_ = std::move(waiting_.front());
    waiting_.pop_front();
    writing_ = true;
    this->StartWrite(&current_);
  }

  void End(const absl::Status& status) {
    ended_ = true;
    this->Finish(net::ToGrpcStatus(status));
  }

  JobController* const controller_;
  const Fetch fetch_;
  std::string job_id_;
  int64_t subscription_ = 0;
  std::deque<Message> waiting_;
  Message current_;  // being written
  bool writing_ = false;
  bool cancelled_ = false;
  bool ended_ = false;
  absl::Status broken_;
};

}  // namespace ppft::coordinator
