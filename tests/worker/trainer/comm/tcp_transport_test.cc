// Ranks are threads of this process, connected over loopback; peers that break the rules are raw sockets.
#include "worker/trainer/comm/tcp_transport.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "worker/trainer/comm/collectives.h"
#include "worker/trainer/comm/frame.h"
#include "worker/trainer/comm/socket.h"

namespace ppft::trainer {
namespace {

using ::testing::HasSubstr;

std::vector<Link> FullMesh(int rank, int size) {
  std::vector<Link> links;
  for (int peer = 0; peer < size; ++peer) {
    if (peer == rank) continue;
    for (Channel channel : {Channel::kControl, Channel::kActivations, Channel::kGradients}) links.push_back({peer, channel});
  }
  return links;
}

TcpOptions OptionsOf(int rank, int size) {
  TcpOptions options;
  options.job_id = "job-test";
  options.epoch = 7;
  options.rank = rank;
  options.size = size;
  options.stall_timeout = absl::Seconds(120);  // for hangs, not for speed
  options.connect_timeout = absl::Seconds(120);
  return options;
}

struct Gang {
  std::vector<TcpListener> listeners;
  std::vector<std::string> endpoints;

  explicit Gang(int size) {
    for (int rank = 0; rank < size; ++rank) {
      listeners.push_back(*TcpListener::Open("127.0.0.1"));
      endpoints.push_back(listeners.back().address());
    }
  }

  // Runs `body` on each rank in a thread of its own; the statuses by rank.
  std::vector<absl::Status> Run(const std::function<absl::Status(Transport&)>& body, const std::function<void(TcpOptions&)>& change = nullptr) {
    const int size = static_cast<int>(listeners.size());
    std::vector<absl::Status> statuses(listeners.size());
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        TcpOptions options = OptionsOf(rank, size);
        if (change) change(options);
        auto transport = ConnectTcp(std::move(listeners[rank]), options, endpoints, FullMesh(rank, size));
        statuses[rank] = transport.ok() ? body(**transport) : transport.status();
      });
    }
    for (std::thread& thread : threads) thread.join();
    return statuses;
  }
};

Buffer BufferOf(std::shared_ptr<std::vector<float>> values) {
  Buffer buffer;
  buffer.data = values->data();
  buffer.bytes = static_cast<int64_t>(values->size() * sizeof(float));
  buffer.owner = values;
  return buffer;
}

std::shared_ptr<std::vector<float>> Values(size_t count, float first) {
  auto values = std::make_shared<std::vector<float>>(count);
  std::iota(values->begin(), values->end(), first);
  return values;
}

TEST(TcpTransport, BigMessagesCrossInBothDirectionsAtOnce) {
  constexpr size_t kCount = 6 * 1000 * 1000;  // 24 MB: more than any socket buffer
  Gang gang(2);
  const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
    const int peer = 1 - transport.rank();
    std::vector<std::shared_ptr<std::vector<float>>> received;
    std::vector<Ticket> tickets;
    for (int m = 0; m < 4; ++m) {
      const auto status = transport.Send(peer, Channel::kActivations, {1, 0, m}, BufferOf(Values(kCount, static_cast<float>(transport.rank() * 10 + m))));
      if (!status.ok()) return status;
    }
    for (int m = 0; m < 4; ++m) {
      received.push_back(std::make_shared<std::vector<float>>(kCount));
      auto ticket = transport.PostReceive(peer, Channel::kActivations, {1, 0, m}, BufferOf(received.back()));
      if (!ticket.ok()) return ticket.status();
      tickets.push_back(*ticket);
    }
    for (int m = 0; m < 4; ++m) {
      const auto status = transport.Wait(tickets[m]);
      if (!status.ok()) return status;
      EXPECT_EQ(*received[m], *Values(kCount, static_cast<float>(peer * 10 + m)));
    }
    EXPECT_EQ(transport.counts().received_bytes, static_cast<int64_t>(4 * kCount * sizeof(float)));
    EXPECT_EQ(transport.counts().sent_bytes, static_cast<int64_t>(4 * kCount * sizeof(float)));
    return transport.Close();
  });
  EXPECT_TRUE(statuses[0].ok()) << statuses[0];
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
}

TEST(TcpTransport, AReceiveTakesItsTagWhateverCameBefore) {
  Gang gang(2);
  const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
    if (transport.rank() == 0) {
      for (int m = 0; m < 8; ++m) {
        const auto status = transport.Send(1, Channel::kGradients, {5, 2, m}, BufferOf(Values(10, static_cast<float>(m))));
        if (!status.ok()) return status;
      }
      return transport.Close();
    }
    for (int m = 7; m >= 0; --m) {
      auto into = std::make_shared<std::vector<float>>(10);
      auto ticket = transport.PostReceive(0, Channel::kGradients, {5, 2, m}, BufferOf(into));
      if (!ticket.ok()) return ticket.status();
      const auto status = transport.Wait(*ticket);
      if (!status.ok()) return status;
      EXPECT_EQ(*into, *Values(10, static_cast<float>(m)));
    }
    return transport.Close();
  });
  for (const auto& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(TcpTransport, AFullRingHoldsTheSenderBackAndLosesNothing) {
  Gang gang(2);
  const auto statuses = gang.Run(
      [&](Transport& transport) -> absl::Status {
        for (int m = 0; m < 200; ++m) {
          auto values = Values(50000, static_cast<float>(m));
          absl::Status status;
          if (transport.rank() == 0) {
            status = transport.Send(1, Channel::kActivations, {1, 0, m}, BufferOf(values));
          } else {
            auto into = std::make_shared<std::vector<float>>(values->size());
            auto ticket = transport.PostReceive(0, Channel::kActivations, {1, 0, m}, BufferOf(into));
            status = ticket.ok() ? transport.Wait(*ticket) : ticket.status();
            EXPECT_EQ(*into, *values);
          }
          if (!status.ok()) return status;
        }
        return transport.Close();
      },
      [](TcpOptions& options) { options.ring_frames = 2; });
  for (const auto& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(TcpTransport, APeerThatDiesIsAnErrorThatNamesItAndNoHang) {
  Gang gang(3);
  const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
    if (transport.rank() == 2) return absl::OkStatus();  // goes without a goodbye
    auto into = std::make_shared<std::vector<float>>(10);
    // Rank 1 waits for rank 0, which is alive: the death of rank 2 ends that too.
    auto ticket = transport.PostReceive(transport.rank() == 0 ? 2 : 0, Channel::kActivations, {1, 0, 0}, BufferOf(into));
    if (!ticket.ok()) return ticket.status();
    return transport.Wait(*ticket);
  });
  EXPECT_EQ(PeerOf(statuses[0]), 2) << statuses[0];
  EXPECT_TRUE(absl::IsUnavailable(statuses[0])) << statuses[0];
  EXPECT_FALSE(statuses[1].ok());
  EXPECT_EQ(PeerOf(statuses[1]), 2) << statuses[1];
}

TEST(TcpTransport, ARankThatGivesUpIsTheOneThatItsPeersName) {
  Gang gang(3);
  const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
    if (transport.rank() == 1) {
      transport.Abort(absl::InternalError("out of memory"));
      return transport.Send(0, Channel::kControl, {1, 0, 0}, BufferOf(Values(1, 0)));
    }
    auto into = std::make_shared<std::vector<float>>(10);
    auto ticket = transport.PostReceive(transport.rank() == 0 ? 2 : 0, Channel::kActivations, {1, 0, 0}, BufferOf(into));
    return ticket.ok() ? transport.Wait(*ticket) : ticket.status();
  });
  EXPECT_EQ(statuses[1], absl::InternalError("out of memory"));
  EXPECT_EQ(PeerOf(statuses[0]), 1) << statuses[0];
  EXPECT_EQ(PeerOf(statuses[2]), 1) << statuses[2];
}

TEST(TcpTransport, ARegularEndOfOnePeerDoesNotDisturbTheOthers) {
  Gang gang(3);
  const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
    if (transport.rank() == 2) return transport.Close();
    absl::SleepFor(absl::Milliseconds(200));  // rank 2 is gone by now; nothing below depends on that
    auto into = std::make_shared<std::vector<float>>(10);
    const int peer = 1 - transport.rank();
    absl::Status status = transport.Send(peer, Channel::kActivations, {1, 0, 0}, BufferOf(Values(10, 3)));
    if (!status.ok()) return status;
    auto ticket = transport.PostReceive(peer, Channel::kActivations, {1, 0, 0}, BufferOf(into));
    if (!ticket.ok()) return ticket.status();
    status = transport.Wait(*ticket);
    return status.ok() ? transport.Close() : status;
  });
  for (const auto& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(TcpTransport, APeerThatEndedIsAnErrorForWhoeverStillWaitsForIt) {
  Gang gang(2);
  const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
    if (transport.rank() == 1) return transport.Close();
    auto into = std::make_shared<std::vector<float>>(10);
    auto ticket = transport.PostReceive(1, Channel::kControl, {1, 0, 0}, BufferOf(into));
    return ticket.ok() ? transport.Wait(*ticket) : ticket.status();
  });
  EXPECT_EQ(PeerOf(statuses[0]), 1);
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("has ended"));
}

TEST(TcpTransport, SilenceEndsAtTheStallTimeout) {
  Gang gang(2);
  std::atomic<bool> done{false};
  const auto statuses = gang.Run(
      [&](Transport& transport) -> absl::Status {
        if (transport.rank() == 1) {
          while (!done) absl::SleepFor(absl::Milliseconds(5));
          return absl::OkStatus();
        }
        auto into = std::make_shared<std::vector<float>>(10);
        auto ticket = transport.PostReceive(1, Channel::kControl, {1, 0, 0}, BufferOf(into));
        const absl::Status status = ticket.ok() ? transport.Wait(*ticket) : ticket.status();
        done = true;
        return status;
      },
      [](TcpOptions& options) { options.stall_timeout = absl::Milliseconds(100); });
  EXPECT_TRUE(absl::IsDeadlineExceeded(statuses[0])) << statuses[0];
  EXPECT_EQ(PeerOf(statuses[0]), 1);
}

TEST(TcpTransport, WithoutALimitAPeerIsWaitedForAsLongAsItLives) {
  Gang gang(2);
  std::atomic<bool> first_came{false};
  const auto statuses = gang.Run(
      [&](Transport& transport) -> absl::Status {
        transport.WaitWithoutLimit();
        if (transport.rank() == 1) {
          absl::SleepFor(absl::Milliseconds(600));
          const absl::Status sent = transport.Send(0, Channel::kControl, {1, 0, 0}, BufferOf(Values(10, 3)));
          while (sent.ok() && !first_came && transport.status().ok()) absl::SleepFor(absl::Milliseconds(5));
          return sent;  // and ends without a goodbye
        }
        for (int pass = 1; pass <= 2; ++pass) {
          auto into = std::make_shared<std::vector<float>>(10);
          auto ticket = transport.PostReceive(1, Channel::kControl, {pass, 0, 0}, BufferOf(into));
          const absl::Status status = ticket.ok() ? transport.Wait(*ticket) : ticket.status();
          if (!status.ok()) return Annotate(status, absl::StrCat("message ", pass));
          first_came = true;
        }
        return absl::OkStatus();
      },
      [](TcpOptions& options) { options.stall_timeout = absl::Milliseconds(100); });
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
  EXPECT_TRUE(absl::IsUnavailable(statuses[0])) << statuses[0];
  EXPECT_EQ(PeerOf(statuses[0]), 1);
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("message 2"));
}

TEST(TcpTransport, AMessageOfAnotherSizeIsRefused) {
  for (const bool post_first : {true, false}) {
    Gang gang(2);
    const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
      if (transport.rank() == 1) {
        if (post_first) absl::SleepFor(absl::Milliseconds(100));
        absl::Status status = transport.Send(0, Channel::kActivations, {1, 0, 0}, BufferOf(Values(11, 0)));
        return status.ok() ? transport.Close() : status;
      }
      if (!post_first) absl::SleepFor(absl::Milliseconds(100));
      auto into = std::make_shared<std::vector<float>>(10);
      auto ticket = transport.PostReceive(1, Channel::kActivations, {1, 0, 0}, BufferOf(into));
      return ticket.ok() ? transport.Wait(*ticket) : ticket.status();
    });
    EXPECT_TRUE(absl::IsDataLoss(statuses[0])) << statuses[0];
    EXPECT_EQ(PeerOf(statuses[0]), 1);
  }
}

TEST(TcpTransport, AWrongEpochOrJobIsRefusedWithTheReason) {
  for (const bool wrong_epoch : {true, false}) {
    Gang gang(2);
    const auto statuses = gang.Run([](Transport& transport) { return absl::OkStatus(); },
                                   [&](TcpOptions& options) {
                                     if (options.rank == 0) options.connect_timeout = absl::Seconds(4);  // in vain; rank 1 is answered at once
                                     if (options.rank == 1 && wrong_epoch) options.epoch = 6;
                                     if (options.rank == 1 && !wrong_epoch) options.job_id = "job-other";
                                   });
    EXPECT_TRUE(absl::IsFailedPrecondition(statuses[1])) << statuses[1];
    EXPECT_THAT(std::string(statuses[1].message()), HasSubstr(wrong_epoch ? "epoch 7 is current, not 6" : "works for job-test, not for job-other"));
    EXPECT_TRUE(absl::IsDeadlineExceeded(statuses[0])) << statuses[0];
    EXPECT_EQ(PeerOf(statuses[0]), 1);
  }
}

// A raw peer that greets as rank 1 and then sends `bytes`.
absl::Status StatusAfter(const std::string& bytes) {
  TcpListener listener = *TcpListener::Open("127.0.0.1");
  const std::string address = listener.address();
  std::thread peer([&] {
    Fd stranger = *Dial(address, absl::Now() + absl::Seconds(120));  // says nothing sensible and is ignored
    const std::string noise = "GET / HTTP/1.0\r\n\r\n";
    EXPECT_TRUE(WriteExactly(stranger.get(), noise.data(), static_cast<int64_t>(noise.size()), absl::InfiniteFuture()).ok());
    Fd fd = *Dial(address, absl::Now() + absl::Seconds(120));
    const std::string out = EncodeHello({"job-test", 7, 1, 0, Channel::kActivations}) + bytes;
    EXPECT_TRUE(WriteExactly(fd.get(), out.data(), static_cast<int64_t>(out.size()), absl::InfiniteFuture()).ok());
    char byte;
    while (recv(fd.get(), &byte, 1, 0) > 0) {
    }
  });
  absl::Status status;
  {
    auto transport = ConnectTcp(std::move(listener), OptionsOf(0, 2), {address, "127.0.0.1:1"}, {{1, Channel::kActivations}});
    EXPECT_TRUE(transport.ok()) << transport.status();
    auto into = std::make_shared<std::vector<float>>(2);
    auto ticket = (*transport)->PostReceive(1, Channel::kActivations, {1, 0, 0}, BufferOf(into));
    status = ticket.ok() ? (*transport)->Wait(*ticket) : ticket.status();
  }
  peer.join();
  return status;
}

TEST(TcpTransport, DamagedFramesAreRefused) {
  FrameHeader header;
  header.channel = Channel::kActivations;
  header.epoch = 7;
  header.tag = {1, 0, 0};
  header.payload_bytes = 8;
  const auto text = [](const FrameHeader& h) {
    const auto bytes = EncodeFrameHeader(h);
    return std::string(bytes.data(), bytes.size());
  };
  const std::string good = text(header);
  EXPECT_TRUE(StatusAfter(good + "12345678").ok());
  for (size_t at = 0; at < good.size(); at += 5) {
    std::string damaged = good;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x40);
    EXPECT_TRUE(absl::IsDataLoss(StatusAfter(damaged + "12345678"))) << "byte " << at;
  }
  FrameHeader huge = header;
  huge.payload_bytes = int64_t{1} << 50;
  const absl::Status too_big = StatusAfter(text(huge));
  EXPECT_TRUE(absl::IsDataLoss(too_big)) << too_big;
  EXPECT_THAT(std::string(too_big.message()), HasSubstr("1125899906842624 bytes"));
  FrameHeader stale = header;
  stale.epoch = 6;
  EXPECT_TRUE(absl::IsFailedPrecondition(StatusAfter(text(stale) + "12345678")));
}

TEST(Collectives, EveryRankGetsTheSameBitsInTheGroupsOrder) {
  for (const int size : {1, 2, 3, 4}) {
    Gang gang(size);
    std::vector<std::vector<double>> gathered(size), summed(size);
    std::vector<std::vector<float>> reduced(size);
    const auto value = [](int rank, size_t i) { return static_cast<float>(std::sin(static_cast<double>(rank * 1000 + static_cast<int>(i)))); };
    const auto statuses = gang.Run([&](Transport& transport) -> absl::Status {
      const int rank = transport.rank();
      std::vector<int> members(size);
      std::iota(members.begin(), members.end(), 0);
      Group group(&transport, 0, members);
      std::vector<int64_t> counts(size);
      for (int i = 0; i < size; ++i) counts[i] = i;  // rank 0 has nothing to say
      std::vector<double> mine(rank, rank + 0.5);
      auto all = group.AllGather(absl::MakeConstSpan(mine), counts);
      if (!all.ok()) return all.status();
      gathered[rank] = *all;
      summed[rank] = {0.1 * (rank + 1), 1e17 * (rank == 0 ? 1 : -1)};
      absl::Status status = group.AllReduceSum(absl::MakeSpan(summed[rank]));
      if (!status.ok()) return status;
      reduced[rank].resize(10007);
      for (size_t i = 0; i < reduced[rank].size(); ++i) reduced[rank][i] = value(rank, i);
      status = group.AllReduceSum(absl::MakeSpan(reduced[rank]));
      if (!status.ok()) return status;
      status = group.Barrier();
      return status.ok() ? transport.Close() : status;
    });
    std::vector<double> expected_gather;
    for (int r = 0; r < size; ++r) {
      for (int k = 0; k < r; ++k) expected_gather.push_back(r + 0.5);
    }
    for (int rank = 0; rank < size; ++rank) {
      EXPECT_TRUE(statuses[rank].ok()) << statuses[rank];
      EXPECT_EQ(gathered[rank], expected_gather);
      EXPECT_EQ(summed[rank], summed[0]);
      for (size_t i = 0; i < reduced[rank].size(); ++i) {
        float sum = value(0, i);
        for (int r = 1; r < size; ++r) sum += value(r, i);
        ASSERT_EQ(reduced[rank][i], sum) << "rank " << rank << " of " << size << ", element " << i;
      }
    }
  }
}

}  // namespace
}  // namespace ppft::trainer
