// A worker that speaks the Connect stream and trains nothing: it takes directives, keeps the set of ranks that would run, and reports what the
// test tells it to.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/net/channel.h"
#include "ppft/v1/worker.grpc.pb.h"

namespace ppft::coordinator {

inline v1::RankKey Key(const std::string& job, int64_t epoch, int rank) {
  v1::RankKey key;
  key.set_job_id(job);
  key.set_epoch(epoch);
  key.set_rank(rank);
  return key;
}

class FakeWorker {
 public:
  static constexpr char kWorkerVersion[] = "1.0.0";
  static constexpr std::chrono::seconds kPatience{120};  // for hangs, not for speed

  FakeWorker(const std::string& server, std::string name, std::string incarnation, int devices = 1, std::string problem = "", std::string kind = "cpu")
      : name_(std::move(name)), incarnation_(std::move(incarnation)), devices_(devices), problem_(std::move(problem)), kind_(std::move(kind)) {
    Connect(server);
  }
  ~FakeWorker() { Disconnect(); }

  // A new stream of the same agent; its ranks live on.
  void Connect(const std::string& server) {
    Disconnect();
    stub_ = v1::WorkerService::NewStub(net::MakeChannel(server));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      welcomed_ = false;
      ended_ = false;
      read_over_ = false;
    }
    context_ = std::make_unique<grpc::ClientContext>();
    context_->set_wait_for_ready(true);
    stream_ = stub_->Connect(context_.get());
    v1::WorkerMessage message;
    v1::WorkerHello& hello = *message.mutable_hello();
    hello.set_name(name_);
    hello.set_incarnation(incarnation_);
    hello.set_address("127.0.0.1");
    hello.set_version(kWorkerVersion);
    if (!problem_.empty()) hello.add_problems(problem_);
    for (int i = 0; i < devices_; ++i) {
      v1::Device& device = *hello.add_devices();
      device.set_id(absl::StrCat(kind_, ":", i));
      device.set_kind(kind_);
      device.set_threads(1);
    }
    for (const auto& [rank, directive] : running_) *hello.add_running() = directive.rank();
    Write(message);
    reader_ = std::thread([this] { Read(); });
    beater_ = std::thread([this] { Beat(); });
  }

  void Disconnect() {
    if (context_ != nullptr) context_->TryCancel();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    if (reader_.joinable()) reader_.join();
    if (beater_.joinable()) beater_.join();
    if (stream_ != nullptr) stream_->Finish();
    stream_.reset();
    context_.reset();
  }

  // Waits for the answer to hello: false if the stream ended instead.
  bool WaitForWelcome() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return welcomed_ || read_over_; });
    return welcomed_;
  }
  // Waits until the coordinator ends the stream, and says how.
  grpc::Status WaitForEnd() {
    reader_.join();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    beater_.join();
    const grpc::Status status = stream_->Finish();
    stream_.reset();
    context_.reset();
    return status;
  }
  // No heartbeats from now on.
  void FallSilent() {
    std::lock_guard<std::mutex> lock(mutex_);
    silent_ = true;
  }

  // Waits until the worker holds this rank at this epoch.
  v1::RankDirective WaitForRank(int rank, int64_t epoch, bool with_peers = false) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] {
      const auto it = running_.find(rank);
      return it != running_.end() && it->second.rank().epoch() == epoch && (!with_peers || it->second.peers_size() > 0);
    });
    return running_[rank];
  }
  // Waits until a trace is wanted of this rank, or none is.
  v1::TraceOrder WaitForTrace(int rank, bool wanted = true) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto order = [&] {
      const auto it = running_.find(rank);
      return it == running_.end() ? v1::TraceOrder() : it->second.trace();
    };
    changed_.wait_for(lock, kPatience, [&] { return (order().id() != 0) == wanted; });
    return order();
  }
  bool WaitForNothing() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] { return running_.empty(); });
  }
  int64_t WaitForAck(int64_t seq) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return acked_ >= seq; });
    return acked_;
  }
  int64_t welcome_acked() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return welcomed_; });
    return welcome_acked_;
  }

  // While set, ranks that are not wanted any more keep running.
  void set_stubborn(bool stubborn) {
    std::lock_guard<std::mutex> lock(mutex_);
    stubborn_ = stubborn;
    if (!stubborn) ApplyLocked(last_);
  }

  // Sends a report with the next number, or with `seq`. Returns the number.
  int64_t Report(const v1::RankKey& rank, const v1::TrainerReport& report, int64_t seq = 0) {
    v1::WorkerMessage message;
    message.mutable_report()->set_seq(seq > 0 ? seq : ++seq_);
    *message.mutable_report()->mutable_rank() = rank;
    *message.mutable_report()->mutable_report() = report;
    Write(message);
    return message.report().seq();
  }

 private:
  void Write(const v1::WorkerMessage& message) {
    std::lock_guard<std::mutex> lock(write_mutex_);
    stream_->Write(message);
  }

  void Read() {
    v1::CoordinatorMessage message;
    while (stream_->Read(&message)) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (message.has_welcome()) {
        welcomed_ = true;
        welcome_acked_ = message.welcome().acked_seq();
      }
      if (message.has_ack()) acked_ = std::max(acked_, message.ack().seq());
      if (message.has_directive()) ApplyLocked(message.directive());
      changed_.notify_all();
    }
    std::lock_guard<std::mutex> lock(mutex_);
    read_over_ = true;
    changed_.notify_all();
  }

  void Beat() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!changed_.wait_for(lock, std::chrono::milliseconds(100), [&] { return ended_; })) {
      if (!silent_) HeartbeatLocked();
    }
  }

  void ApplyLocked(const v1::Directive& directive) {
    last_ = directive;
    std::map<int32_t, v1::RankDirective> wanted;
    for (const v1::RankDirective& rank : directive.ranks()) wanted[rank.rank().rank()] = rank;
    if (stubborn_) {
      for (const auto& [rank, running] : running_) wanted.emplace(rank, running);
    }
    running_ = wanted;
    HeartbeatLocked();
  }

  void HeartbeatLocked() {
    v1::WorkerMessage message;
    message.mutable_heartbeat()->set_applied_revision(last_.revision());
    for (const auto& [rank, running] : running_) *message.mutable_heartbeat()->add_running() = running.rank();
    Write(message);
  }

  const std::string name_;
  const std::string incarnation_;
  const int devices_;
  const std::string problem_;
  const std::string kind_;  // of its devices
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>> stream_;
  std::thread reader_;
  std::thread beater_;
  std::mutex write_mutex_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int32_t, v1::RankDirective> running_;  // guarded by mutex_, like all below
  v1::Directive last_;
  bool stubborn_ = false;
  bool ended_ = false;
  bool read_over_ = false;
  bool silent_ = false;
  bool welcomed_ = false;
  int64_t welcome_acked_ = -1;
  int64_t acked_ = 0;
  int64_t seq_ = 0;
};

}  // namespace ppft::coordinator
