#include "worker/trainer/comm/tcp_transport.h"

#include <atomic>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "worker/trainer/comm/frame.h"
#include "worker/trainer/comm/socket.h"
#include "worker/trainer/comm/tcp_connection.h"

namespace ppft::trainer {
namespace {

using LinkKey = std::pair<int, Channel>;
constexpr absl::Duration kGreetingTimeout = absl::Seconds(10);

class TcpTransport : public Transport {
 public:
  explicit TcpTransport(const TcpOptions& options) : options_(options) {}
  ~TcpTransport() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      sealed_ = false;  // the threads that end now must not walk over the map
    }
    connections_.clear();
  }

  void Add(const LinkKey& key, Fd fd) {
    TcpConnectionOptions options;
    options.rank = options_.rank;
    options.peer = key.first;
    options.channel = key.second;
    options.epoch = options_.epoch;
    options.ring_frames = options_.ring_frames;
    options.max_frame_bytes = options_.max_frame_bytes;
    options.stall_timeout = options_.stall_timeout;
    if (key.second == Channel::kControl) options.peer_silence = options_.peer_silence;
    connections_[key] = std::make_unique<TcpConnection>(std::move(fd), options, [this](const absl::Status& cause) { OnFailure(cause); });
  }

  // From here on the failure of one connection ends all.
  void Seal() {
    std::lock_guard<std::mutex> lock(mutex_);
    sealed_ = true;
    if (!status_.ok()) AbortAll(status_);
  }

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }

  absl::StatusOr<Ticket> PostReceive(int peer, Channel channel, const Tag& tag, Buffer buffer) override {
    PPFT_ASSIGN_OR_RETURN(TcpConnection * connection, Find(peer, channel));
    auto receive = std::make_shared<Receive>();
    receive->buffer = std::move(buffer);
    receive->tag = tag;
    PPFT_RETURN_IF_ERROR(First(connection->Post(receive)));
    const Ticket ticket = next_ticket_++;
    pending_[ticket] = {connection, std::move(receive)};
    return ticket;
  }

  absl::Status Send(int peer, Channel channel, const Tag& tag, Buffer buffer) override {
    PPFT_ASSIGN_OR_RETURN(TcpConnection * connection, Find(peer, channel));
    return First(connection->Send(tag, std::move(buffer)));
  }

  absl::Status Wait(Ticket ticket) override {
    auto found = pending_.find(ticket);
    if (found == pending_.end()) return absl::InternalError("waiting for a receive that was not posted");
    auto [connection, receive] = std::move(found->second);
    pending_.erase(found);
    return First(connection->Wait(*receive));
  }

  void WaitWithoutLimit() override {
    for (auto& [key, connection] : connections_) connection->WaitWithoutLimit();
  }

  absl::Status Close() override {
    absl::Status status;
    for (auto& [key, connection] : connections_) {
      const absl::Status finished = connection->Finish();
      if (status.ok()) status = finished;
    }
    return First(status);
  }

  void Abort(const absl::Status& cause) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = cause;
    AbortAll(cause);
  }

  absl::Status status() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return status_;
  }

  TransferCounts counts() const override {
    TransferCounts sum;
    for (const auto& [key, connection] : connections_) {
      const TransferCounts counts = connection->counts();
      sum.sent_bytes += counts.sent_bytes;
      sum.received_bytes += counts.received_bytes;
    }
    return sum;
  }

 private:
  absl::StatusOr<TcpConnection*> Find(int peer, Channel channel) {
    auto found = connections_.find({peer, channel});
    if (found == connections_.end()) return absl::InternalError(absl::StrCat("no link to rank ", peer, " on channel ", static_cast<int>(channel)));
    return found->second.get();
  }

  // The first cause instead of its consequence. An error ends the whole transport: a message that comes later must find nothing to write to.
  absl::Status First(const absl::Status& status) {
    if (status.ok()) return status;
    std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = status;
    AbortAll(status_);
    return status_;
  }

  void OnFailure(const absl::Status& cause) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = cause;
    if (sealed_) AbortAll(cause);
  }

  // mutex_ is held; it is taken before a connection's own.
  void AbortAll(const absl::Status& cause) {
    for (auto& [key, connection] : connections_) connection->Abort(cause);
  }

  const TcpOptions options_;
  std::map<LinkKey, std::unique_ptr<TcpConnection>> connections_;  // constant once sealed
  std::map<Ticket, std::pair<TcpConnection*, std::shared_ptr<Receive>>> pending_;
  Ticket next_ticket_ = 1;

  mutable std::mutex mutex_;
  absl::Status status_;  // guarded by mutex_: the first cause
  bool sealed_ = false;  // guarded by mutex_
};

absl::StatusOr<std::string> ReadPrefixed(int fd, absl::Time deadline) {
  char prefix[kHelloPrefixBytes];
  PPFT_RETURN_IF_ERROR(ReadExactly(fd, prefix, kHelloPrefixBytes, deadline));
  PPFT_ASSIGN_OR_RETURN(const int size, DecodeHelloPrefix(absl::string_view(prefix, kHelloPrefixBytes)));
  std::string body(static_cast<size_t>(size), '\0');
  PPFT_RETURN_IF_ERROR(ReadExactly(fd, body.data(), size, deadline));
  return body;
}

// Why this greeting is not welcome; "" if it is.
std::string Refusal(const Hello& hello, const TcpOptions& options, const std::map<LinkKey, Fd>& expected_absent, const std::vector<Link>& links) {
  if (hello.job_id != options.job_id) return absl::StrCat("this trainer works for ", options.job_id, ", not for ", hello.job_id);
  if (hello.epoch != options.epoch) return absl::StrCat("epoch ", options.epoch, " is current, not ", hello.epoch);
  if (hello.to_rank != options.rank) return absl::StrCat("this is rank ", options.rank, ", not ", hello.to_rank);
  bool known = false;
  for (const Link& link : links) known = known || (link.peer == hello.rank && link.channel == hello.channel && link.peer > options.rank);
  if (!known) return absl::StrCat("no link with rank ", hello.rank, " on channel ", static_cast<int>(hello.channel), " is planned");
  if (expected_absent.count({hello.rank, hello.channel}) != 0) return absl::StrCat("rank ", hello.rank, " is already connected");
  return "";
}

// Takes the links of higher ranks until all are there. A connection that is not welcome is closed and does no harm.
absl::Status AcceptLinks(const TcpListener& listener, const TcpOptions& options, const std::vector<Link>& links, absl::Time deadline,
                         const std::atomic<bool>& cancelled, std::map<LinkKey, Fd>* accepted) {
  size_t wanted = 0;
  for (const Link& link : links) wanted += link.peer > options.rank ? 1 : 0;
  while (accepted->size() < wanted) {
    if (cancelled) return absl::CancelledError("another link failed");
    absl::StatusOr<Fd> fd = AcceptUntil(listener.fd(), std::min(deadline, absl::Now() + absl::Milliseconds(200)));
    if (absl::IsDeadlineExceeded(fd.status()) && absl::Now() < deadline) continue;
    if (!fd.ok()) {
      for (const Link& link : links) {
        if (link.peer <= options.rank || accepted->count({link.peer, link.channel}) != 0) continue;
        return WithPeer(
            absl::DeadlineExceededError(absl::StrCat("rank ", link.peer, " did not connect within ", absl::FormatDuration(options.connect_timeout))),
            link.peer);
      }
      return fd.status();
    }
    const absl::Time greeting_deadline = std::min(deadline, absl::Now() + kGreetingTimeout);
    absl::StatusOr<std::string> body = ReadPrefixed(fd->get(), greeting_deadline);
    absl::StatusOr<Hello> hello = body.ok() ? DecodeHello(*body) : absl::StatusOr<Hello>(body.status());
    const std::string refusal = hello.ok() ? Refusal(*hello, options, *accepted, links) : std::string(hello.status().message());
    const std::string reply = EncodeHelloReply(refusal.substr(0, kMaxHelloBytes));
    const absl::Status replied = WriteExactly(fd->get(), reply.data(), static_cast<int64_t>(reply.size()), greeting_deadline);
    if (!refusal.empty() || !replied.ok()) {
      LogWarning("a connection was refused: ", refusal.empty() ? std::string(replied.message()) : refusal);
      continue;
    }
    (*accepted)[{hello->rank, hello->channel}] = *std::move(fd);
  }
  return absl::OkStatus();
}

absl::StatusOr<Fd> DialLink(const TcpOptions& options, const std::string& address, const Link& link, absl::Time deadline) {
  while (true) {
    absl::StatusOr<Fd> fd = Dial(address, deadline);
    absl::Status status = fd.status();
    if (status.ok()) {
      const std::string hello = EncodeHello({options.job_id, options.epoch, options.rank, link.peer, link.channel});
      status = WriteExactly(fd->get(), hello.data(), static_cast<int64_t>(hello.size()), deadline);
      if (status.ok()) {
        absl::StatusOr<std::string> refusal = ReadPrefixed(fd->get(), deadline);
        if (refusal.ok() && refusal->empty()) return fd;
        if (refusal.ok()) return absl::FailedPreconditionError(absl::StrCat("refused: ", *refusal));
        status = refusal.status();
      }
    }
    if (absl::Now() >= deadline || !absl::IsUnavailable(status)) return status;
    absl::SleepFor(absl::Milliseconds(50));
  }
}

absl::Status DialLinks(const TcpOptions& options, const std::vector<std::string>& endpoints, const std::vector<Link>& links, absl::Time deadline,
                       std::map<LinkKey, Fd>* dialled) {
  for (const Link& link : links) {
    if (link.peer >= options.rank) continue;
    absl::StatusOr<Fd> fd = DialLink(options, endpoints[static_cast<size_t>(link.peer)], link, deadline);
    if (!fd.ok()) return WithPeer(Annotate(fd.status(), absl::StrCat("rank ", link.peer, " at ", endpoints[static_cast<size_t>(link.peer)])), link.peer);
    (*dialled)[{link.peer, link.channel}] = *std::move(fd);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TcpListener> TcpListener::Open(const std::string& host) {
  PPFT_ASSIGN_OR_RETURN(auto bound, ListenOn(host));
  TcpListener listener;
  listener.fd_ = std::move(bound.first);
  listener.address_ = std::move(bound.second);
  return listener;
}

absl::StatusOr<std::unique_ptr<Transport>> ConnectTcp(TcpListener listener, const TcpOptions& options, const std::vector<std::string>& endpoints,
                                                      const std::vector<Link>& links) {
  for (const Link& link : links) {
    if (link.peer < 0 || link.peer == options.rank || link.peer >= static_cast<int>(endpoints.size())) {
      return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " cannot have a link to rank ", link.peer, " of ", endpoints.size()));
    }
  }
  const absl::Time deadline = absl::Now() + options.connect_timeout;
  std::map<LinkKey, Fd> accepted, dialled;
  std::atomic<bool> cancelled{false};
  absl::Status accept_status;
  std::thread acceptor([&] { accept_status = AcceptLinks(listener, options, links, deadline, cancelled, &accepted); });
  const absl::Status dial_status = DialLinks(options, endpoints, links, deadline, &dialled);
  if (!dial_status.ok()) cancelled = true;
  acceptor.join();
  PPFT_RETURN_IF_ERROR(dial_status);
  PPFT_RETURN_IF_ERROR(accept_status);
  auto transport = std::make_unique<TcpTransport>(options);
  for (auto& [key, fd] : accepted) transport->Add(key, std::move(fd));
  for (auto& [key, fd] : dialled) transport->Add(key, std::move(fd));
  transport->Seal();
  return absl::StatusOr<std::unique_ptr<Transport>>(std::move(transport));
}

}  // namespace ppft::trainer
