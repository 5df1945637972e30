#include "worker/agent/link.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/logging.h"
#include "common/base/proto_time.h"
#include "common/net/status.h"

namespace ppft::agent {
namespace {

constexpr size_t kReportsPerBatch = 256;
constexpr size_t kBytesPerBatch = 1 << 20;
// Streams in a row that end with a refusal before their first report is acknowledged: then it is that report.
constexpr int kRefusals = 3;
constexpr std::chrono::milliseconds kFirstPause(100);
constexpr std::chrono::milliseconds kLongestPause(2000);

absl::Duration Positive(const google::protobuf::Duration& duration, absl::Duration fallback) {
  const absl::Duration value = ToDuration(duration);
  return value > absl::ZeroDuration() ? value : fallback;
}

// How a stream ends when a message was not to be read, or not to be taken: too large, malformed, broken rules.
bool IsRefusal(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kDataLoss:
      return true;
    default:
      return false;
  }
}

bool IsNameTaken(const absl::Status& status) {
  const std::string reason = net::GetErrorInfo(status).reason;
  return reason == "WORKER_REPLACED" || reason == "WORKER_NAME_IN_USE";
}

}  // namespace

Link::Link(std::shared_ptr<grpc::Channel> channel, std::string coordinator, ReportQueue* reports, LinkCallbacks callbacks)
    : channel_(std::move(channel)),
      coordinator_(std::move(coordinator)),
      stub_(v1::WorkerService::NewStub(channel_)),
      reports_(reports),
      callbacks_(std::move(callbacks)) {}

void Link::Start() {
  thread_ = std::thread([this] { Run(); });
}

Link::~Link() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    if (context_ != nullptr) context_->TryCancel();
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void Link::Wake(bool heartbeat) {
  std::lock_guard<std::mutex> lock(mutex_);
  heartbeat_due_ = heartbeat_due_ || heartbeat;
  reports_due_ = true;
  changed_.notify_all();
}

void Link::Flush(absl::Duration timeout) {
  const auto end = std::chrono::steady_clock::now() + absl::ToChronoMilliseconds(timeout);
  while (!reports_->empty() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

void Link::Run() {
  std::minstd_rand random(std::random_device{}());
  std::chrono::milliseconds pause = kFirstPause;
  std::string told;
  while (true) {
    welcomed_ = false;
    const absl::Status status = Serve();
    callbacks_.on_connected(false);
    const bool name_taken = IsNameTaken(status);
    if (name_taken) callbacks_.on_name_taken();
    if (net::GetErrorInfo(status).reason == "VERSION_MISMATCH") return callbacks_.on_refused(status);
    JudgeOldestReport(status);
    std::unique_lock<std::mutex> lock(mutex_);
    if (stopping_) return;
    if (welcomed_) pause = kFirstPause;
    // Once per cause: the coordinator may be away for hours.
    if (told != status.message()) {
      LogWarning("no link to the coordinator at ", coordinator_, ": ", status.message(), name_taken ? "; trying again" : "; trying again, trainers go on");
    }
    told = std::string(status.message());
    const auto jitter = std::chrono::milliseconds(random() % (pause.count() / 2 + 1));
    if (changed_.wait_for(lock, pause / 2 + jitter, [this] { return stopping_; })) return;
    pause = std::min(pause * 2, kLongestPause);
  }
}

void Link::JudgeOldestReport(const absl::Status& end) {
  const int64_t oldest = reports_->first();
  if (oldest != suspect_seq_) suspect_refusals_ = 0;
  suspect_seq_ = oldest;
  if (oldest == 0 || oldest > sent_seq_ || !IsRefusal(end) || ++suspect_refusals_ < kRefusals) return;
  reports_->Refuse(oldest, absl::StrCat("the coordinator refused it ", kRefusals, " times: ", end.message()));
  suspect_refusals_ = 0;
}

absl::Status Link::Serve() {
  sent_seq_ = 0;
  grpc::ClientContext context;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return absl::CancelledError("stopping");
    context_ = &context;
    stream_broken_ = false;
  }
  std::unique_ptr<Stream> stream = stub_->Connect(&context);
  v1::WorkerMessage hello;
  *hello.mutable_hello() = callbacks_.hello();
  std::thread writer;
  if (stream->Write(hello)) {
    v1::CoordinatorMessage message;
    while (stream->Read(&message)) {
      switch (message.message_case()) {
        case v1::CoordinatorMessage::kWelcome: {
          if (writer.joinable()) break;
          LogInfo("linked to the coordinator at ", coordinator_);
          welcomed_ = true;
          callbacks_.on_connected(true);
          reports_->Acknowledge(message.welcome().acked_seq());
          const int64_t acked = message.welcome().acked_seq();
          const absl::Duration interval = Positive(message.welcome().heartbeat_interval(), absl::Seconds(2));
          writer = std::thread([this, raw = stream.get(), acked, interval] { Write(raw, acked, interval); });
          break;
        }
        case v1::CoordinatorMessage::kDirective:
          callbacks_.on_directive(message.directive());
          applied_revision_ = message.directive().revision();
          Wake(true);
          break;
        case v1::CoordinatorMessage::kAck:
          reports_->Acknowledge(message.ack().seq());
          break;
        case v1::CoordinatorMessage::kClock: {
          const int64_t now = absl::GetCurrentTimeNanos();
          std::lock_guard<std::mutex> lock(mutex_);
          clock_.Add(message.clock(), now);
          break;
        }
        case v1::CoordinatorMessage::MESSAGE_NOT_SET:
          break;
      }
    }
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stream_broken_ = true;
    context_ = nullptr;
    changed_.notify_all();
  }
  if (writer.joinable()) writer.join();
  const grpc::Status status = stream->Finish();
  if (status.ok()) return absl::UnavailableError("the coordinator closed the stream");
  return net::StatusFromGrpc(status);
}

void Link::Write(Stream* stream, int64_t acked, absl::Duration interval) {
  int64_t sent = acked;
  auto next_heartbeat = std::chrono::steady_clock::now();
  while (true) {
    bool heartbeat;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait_until(lock, next_heartbeat, [this] { return stopping_ || stream_broken_ || heartbeat_due_ || reports_due_; });
      if (stopping_ || stream_broken_) return;
      heartbeat = std::exchange(heartbeat_due_, false) || std::chrono::steady_clock::now() >= next_heartbeat;
      reports_due_ = false;
    }
    // Reports first: a heartbeat that says "ended" must not overtake the report of how.
    while (true) {
      const std::vector<v1::RankReport> batch = reports_->After(sent, kReportsPerBatch, kBytesPerBatch);
      if (batch.empty()) break;
      for (const v1::RankReport& report : batch) {
        v1::WorkerMessage message;
        *message.mutable_report() = report;
        sent_seq_ = report.seq();
        if (!stream->Write(message)) return;
        sent = report.seq();
      }
    }
    if (heartbeat) {
      if (!WriteHeartbeat(stream)) return;
      next_heartbeat = std::chrono::steady_clock::now() + absl::ToChronoMilliseconds(interval);
    }
  }
}

bool Link::WriteHeartbeat(Stream* stream) {
  v1::WorkerMessage message;
  v1::Heartbeat* heartbeat = message.mutable_heartbeat();
  *heartbeat = callbacks_.heartbeat();
  heartbeat->set_applied_revision(applied_revision_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (clock_.known()) *heartbeat->mutable_clock() = clock_.Get();
  }
  heartbeat->set_sent_unix_nanos(absl::GetCurrentTimeNanos());
  return stream->Write(message);
}

}  // namespace ppft::agent
