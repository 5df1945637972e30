// Two ranks are threads of this process; their devices are host memory with communicators that behave as the plugin's: a receive is done when its message
// has come, waiting for it blocks like a stream, and an abort lets everything go on with garbage.
#include "worker/trainer/comm/device/device_transport.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "absl/time/clock.h"
#include "worker/trainer/comm/tcp_transport.h"

namespace ppft::trainer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// What both ends of a communicator share.
struct Wire {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::vector<char>> messages;
  int members = 0;
  std::vector<std::string> log;  // "receive", "wait" of the receiving end, in order
  std::string error;             // what the communicator says of itself
};

class FakeComm : public DeviceComm {
 public:
  explicit FakeComm(std::shared_ptr<Wire> wire) : wire_(std::move(wire)) {}

  uint64_t Send(const void* data, int64_t bytes, int) override {
    const std::lock_guard<std::mutex> lock(wire_->mutex);
    if (aborted_) throw std::runtime_error("aborted");
    wire_->messages.emplace_back(static_cast<const char*>(data), static_cast<const char*>(data) + bytes);
    wire_->changed.notify_all();
    sends_ = true;
    return ++operations_;
  }
  uint64_t Receive(void* data, int64_t bytes, int) override {
    const std::lock_guard<std::mutex> lock(wire_->mutex);
    wire_->log.push_back("receive");
    posted_.push_back({data, bytes});
    return ++operations_;
  }
  uint64_t AllReduceSum(float*, int64_t) override { return ++operations_; }
  uint64_t ReduceScatter(float*, const std::vector<int64_t>&) override { return ++operations_; }
  uint64_t AllGather(float*, const std::vector<int64_t>&) override { return ++operations_; }
  void WaitOnStream(uint64_t operation) override {
    std::unique_lock<std::mutex> lock(wire_->mutex);
    if (sends_) return;  // has left at once
    wire_->log.push_back("wait");
    while (done_ < operation) {
      wire_->changed.wait(lock, [&] { return aborted_ || !wire_->messages.empty(); });
      if (aborted_) return;
      const std::vector<char> message = std::move(wire_->messages.front());
      wire_->messages.pop_front();
      std::memcpy(posted_[done_].first, message.data(), message.size());
      ++done_;
    }
  }
  // Of sends the host never hears: it is always ahead of the device.
  bool Done(uint64_t operation) override { return operation <= done_; }
  std::string AsyncError() override {
    const std::lock_guard<std::mutex> lock(wire_->mutex);
    return wire_->error;
  }
  // This end alone.
  void Abort() {
    const std::lock_guard<std::mutex> lock(wire_->mutex);
    aborted_ = true;
    wire_->changed.notify_all();
  }

 private:
  const std::shared_ptr<Wire> wire_;
  bool aborted_ = false;
  bool sends_ = false;
  uint64_t operations_ = 0;
  uint64_t done_ = 0;
  std::vector<std::pair<void*, int64_t>> posted_;
};

// Shared by all ranks, as the network is.
class FakeComms : public DeviceComms {
 public:
  DeviceCommId NewId() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    DeviceCommId id{};
    id[0] = static_cast<char>(++ids_);
    wires_[id[0]] = std::make_shared<Wire>();
    return id;
  }
  std::unique_ptr<DeviceComm> Make(const DeviceCommId& id, int size, int member) override {
    std::shared_ptr<Wire> wire;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      wire = wires_.at(id[0]);
    }
    std::unique_lock<std::mutex> lock(wire->mutex);
    ++wire->members;
    wire->changed.notify_all();
    wire->changed.wait(lock, [&] { return wire->members == size || closed; });
    return std::make_unique<FakeComm>(wire);
  }
  void Abort(const std::vector<DeviceComm*>& comms) override {
    for (DeviceComm* comm : comms) {
      static_cast<FakeComm*>(comm)->Abort();
    }
  }
  std::map<char, std::shared_ptr<Wire>>& wires() { return wires_; }

  std::atomic<bool> closed{false};

 private:
  std::mutex mutex_;
  int ids_ = 0;
  std::map<char, std::shared_ptr<Wire>> wires_;
};

// Runs `body` on ranks 0 and 1 over their host transports.
std::vector<absl::Status> RunTwo(const std::function<absl::Status(int rank, std::unique_ptr<Transport> host)>& body,
                                 const std::array<absl::Duration, 2>& silence = {absl::InfiniteDuration(), absl::InfiniteDuration()}) {
  std::vector<TcpListener> listeners;
  std::vector<std::string> endpoints;
  for (int rank = 0; rank < 2; ++rank) {
    listeners.push_back(*TcpListener::Open("127.0.0.1"));
    endpoints.push_back(listeners.back().address());
  }
  std::vector<absl::Status> statuses(2);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      TcpOptions options;
      options.job_id = "job-test";
      options.rank = rank;
      options.size = 2;
      options.peer_silence = silence[static_cast<size_t>(rank)];
      auto host = ConnectTcp(std::move(listeners[static_cast<size_t>(rank)]), options, endpoints, {{1 - rank, Channel::kControl}});
      statuses[static_cast<size_t>(rank)] = host.ok() ? body(rank, *std::move(host)) : host.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

const DeviceTransportOptions kPipeline = {{{Channel::kActivations, 0, 1}, {Channel::kGradients, 1, 0}}, {}, /*sends_held=*/3, absl::Seconds(120)};
const DeviceTransportOptions kReplicas = {{}, {0, 1}, /*sends_held=*/3, absl::Seconds(120)};

Buffer Of(std::vector<float>* values) { return {values->data(), static_cast<int64_t>(values->size() * sizeof(float)), nullptr}; }

TEST(DeviceTransportTest, MessagesComeInTheOrderOfThePostsAndNoReceiveWaitsOnTheDeviceBeforeItIsNeeded) {
  FakeComms comms;
  std::vector<std::vector<float>> got;
  const auto statuses = RunTwo([&](int rank, std::unique_ptr<Transport> host) -> absl::Status {
    auto transport = DeviceTransport::Connect(std::move(host), &comms, kPipeline);
    if (!transport.ok()) return transport.status();
    for (int64_t pass = 1; pass <= 2; ++pass) {
      std::vector<std::vector<float>> values(2, std::vector<float>(3, 0.0f));
      std::vector<Ticket> tickets;
      for (int m = 0; m < 2; ++m) {
        auto& value = values[static_cast<size_t>(m)];
        if (rank == 0) {
          value.assign(3, static_cast<float>(10 * pass + m));
          const absl::Status sent = (*transport)->Send(1, Channel::kActivations, {pass, 0, m}, Of(&value));
          if (!sent.ok()) return sent;
        } else {
          auto ticket = (*transport)->PostReceive(0, Channel::kActivations, {pass, 0, m}, Of(&value));
          if (!ticket.ok()) return ticket.status();
          tickets.push_back(*ticket);
        }
      }
      for (const Ticket ticket : tickets) {
        const absl::Status waited = (*transport)->Wait(ticket);
        if (!waited.ok()) return waited;
      }
      if (rank == 1) got.insert(got.end(), values.begin(), values.end());
    }
    return (*transport)->Close();
  });
  EXPECT_TRUE(statuses[0].ok()) << statuses[0];
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
  EXPECT_THAT(got, ElementsAre(ElementsAre(10, 10, 10), ElementsAre(11, 11, 11), ElementsAre(20, 20, 20), ElementsAre(21, 21, 21)));
  std::vector<std::string> log;
  for (const auto& [id, wire] : comms.wires()) log.insert(log.end(), wire->log.begin(), wire->log.end());
  EXPECT_THAT(log, ElementsAre("receive", "wait", "receive", "wait", "receive", "wait", "receive", "wait"));
}

TEST(DeviceTransportTest, FewMessagesAreHeldHoweverFarTheHostIsAheadOfTheDevice) {
  FakeComms comms;
  std::array<long, 2> most_held{};
  constexpr int kMessages = 12;
  const auto statuses = RunTwo([&](int rank, std::unique_ptr<Transport> host) -> absl::Status {
    auto transport = DeviceTransport::Connect(std::move(host), &comms, kPipeline);
    if (!transport.ok()) return transport.status();
    const auto alive = std::make_shared<int>(0);  // its count: buffers that live, and this one
    for (int m = 0; m < kMessages; ++m) {
      auto values = std::make_shared<std::vector<float>>(3, static_cast<float>(m));
      Buffer buffer = Of(values.get());
      buffer.owner = std::shared_ptr<void>(values.get(), [values, alive](void*) {});
      if (rank == 0) {
        const absl::Status sent = (*transport)->Send(1, Channel::kActivations, {1, 0, m}, std::move(buffer));
        if (!sent.ok()) return sent;
      } else {
        auto ticket = (*transport)->PostReceive(0, Channel::kActivations, {1, 0, m}, std::move(buffer));
        if (!ticket.ok()) return ticket.status();
        const absl::Status waited = (*transport)->Wait(*ticket);
        if (!waited.ok()) return waited;
        if (values->front() != static_cast<float>(m)) return absl::DataLossError("another message");
      }
      most_held[static_cast<size_t>(rank)] = std::max(most_held[static_cast<size_t>(rank)], alive.use_count() - 1);
    }
    return (*transport)->Close();
  });
  EXPECT_TRUE(statuses[0].ok()) << statuses[0];
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
  EXPECT_THAT(most_held, ElementsAre(3, 0));
}

TEST(DeviceTransportTest, APeerThatFailsEndsAStuckReceiveAndIsNamed) {
  FakeComms comms;
  const auto statuses = RunTwo([&](int rank, std::unique_ptr<Transport> host) -> absl::Status {
    auto transport = DeviceTransport::Connect(std::move(host), &comms, kPipeline);
    if (!transport.ok()) return transport.status();
    if (rank == 1) {
      (*transport)->Abort(absl::InternalError("this rank gives up"));
      return absl::OkStatus();
    }
    std::vector<float> value(3);
    auto ticket = (*transport)->PostReceive(1, Channel::kGradients, {1, 1, 0}, Of(&value));
    if (!ticket.ok()) return ticket.status();
    const absl::Status waited = (*transport)->Wait(*ticket);  // comes back with garbage
    return waited.ok() ? (*transport)->status() : waited;
  });
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
  EXPECT_EQ(PeerOf(statuses[0]), 1) << statuses[0];
}

// Between two looks of the watching thread: what came from the device would still pass for a result.
TEST(DeviceTransportTest, TheStatusAsksTheCommunicatorsOfNeighboursAndOfReplicas) {
  for (const DeviceTransportOptions& options : {kPipeline, kReplicas}) {
    SCOPED_TRACE(options.group.empty() ? "neighbours" : "replicas");
    FakeComms comms;
    std::atomic<bool> over{false};
    const auto statuses = RunTwo([&](int rank, std::unique_ptr<Transport> host) -> absl::Status {
      auto transport = DeviceTransport::Connect(std::move(host), &comms, options);
      if (!transport.ok()) return transport.status();
      if (rank == 1) {
        while (!over) absl::SleepFor(absl::Milliseconds(1));
        return absl::OkStatus();
      }
      absl::Status status = (*transport)->status();
      if (!status.ok()) return absl::InternalError("failed before anything was wrong");
      for (const auto& [id, wire] : comms.wires()) {
        const std::lock_guard<std::mutex> lock(wire->mutex);
        wire->error = "remote process exited";
      }
      status = (*transport)->status();
      over = true;
      return status;
    });
    EXPECT_EQ(statuses[0].code(), absl::StatusCode::kUnavailable) << statuses[0];
    EXPECT_EQ(PeerOf(statuses[0]), 1);
    EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("remote process exited"));
  }
}

TEST(DeviceTransportTest, ACommunicatorThatDoesNotComeAboutIsAnErrorWithItsPeer) {
  FakeComms comms;
  const auto statuses = RunTwo([&](int rank, std::unique_ptr<Transport> host) -> absl::Status {
    if (rank == 0) {
      DeviceTransportOptions options = kPipeline;
      options.init_timeout = absl::Milliseconds(200);
      const auto transport = DeviceTransport::Connect(std::move(host), &comms, options);
      comms.closed = true;
      for (const auto& [id, wire] : comms.wires()) wire->changed.notify_all();
      return transport.status();
    }
    // Takes the id and never joins.
    while (host->status().ok() && !comms.closed) absl::SleepFor(absl::Milliseconds(5));
    return absl::OkStatus();
  });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDeadlineExceeded) << statuses[0];
  EXPECT_EQ(PeerOf(statuses[0]), 1);
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("ranks 0 and 1"));
}

TEST(HostTransportTest, BeatsKeepRanksAliveThatSendNothing) {
  const auto statuses = RunTwo(
      [&](int, std::unique_ptr<Transport> host) -> absl::Status {
        absl::SleepFor(absl::Seconds(8));
        if (!host->status().ok()) return host->status();
        return host->Close();
      },
      {absl::Seconds(6), absl::Seconds(6)});  // a beat may be late by most of it
  EXPECT_TRUE(statuses[0].ok()) << statuses[0];
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
}

TEST(HostTransportTest, APeerWithoutASignOfLifeIsLost) {
  std::atomic<bool> over{false};
  const auto statuses = RunTwo(
      [&](int rank, std::unique_ptr<Transport> host) -> absl::Status {
        while (rank == 0 && host->status().ok()) absl::SleepFor(absl::Milliseconds(5));
        if (rank == 0) over = true;
        while (!over) absl::SleepFor(absl::Milliseconds(5));
        return rank == 0 ? host->status() : absl::OkStatus();
      },
      {absl::Milliseconds(200), absl::InfiniteDuration()});  // rank 1 sends no beats, as a stopped process
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDeadlineExceeded) << statuses[0];
  EXPECT_EQ(PeerOf(statuses[0]), 1);
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("no sign of life"));
}

}  // namespace
}  // namespace ppft::trainer
