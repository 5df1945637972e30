#include "worker/trainer/comm/tcp_connection.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "worker/trainer/comm/socket.h"

namespace ppft::trainer {
namespace {

std::chrono::nanoseconds Chrono(absl::Duration d) { return absl::ToChronoNanoseconds(std::min(d, absl::Hours(24 * 365))); }

std::string Name(const Tag& tag) { return absl::StrCat("pass ", tag.pass, ", stage ", tag.stage, ", micro-batch ", tag.microbatch); }

}  // namespace

TcpConnection::TcpConnection(Fd fd, const TcpConnectionOptions& options, std::function<void(const absl::Status&)> on_failure)
    : fd_(std::move(fd)), options_(options), on_failure_(std::move(on_failure)), patience_(options.stall_timeout) {
  sender_ = std::thread([this] { SendLoop(); });
  receiver_ = std::thread([this] { ReceiveLoop(); });
}

TcpConnection::~TcpConnection() {
  Abort(absl::CancelledError("the transport is closed"));
  sender_.join();
  receiver_.join();
}

void TcpConnection::Abort(const absl::Status& cause) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (status_.ok()) {
    status_ = cause;
    if (!absl::IsCancelled(cause) && queue_.empty() && !sending_ && !peer_said_goodbye_) {
      FrameHeader header;
      header.kind = FrameKind::kAbort;
      header.channel = options_.channel;
      header.epoch = options_.epoch;
      header.tag.stage = PeerOf(cause) >= 0 ? PeerOf(cause) : options_.rank;
      Outgoing out{EncodeFrameHeader(header), Buffer()};
      [[maybe_unused]] const absl::Status ignored = SendNow(&out);  // the peer may be the one that is gone
    }
  }
  shutdown(fd_.get(), SHUT_RDWR);
  send_changed_.notify_all();
  receive_changed_.notify_all();
  ring_changed_.notify_all();
}

void TcpConnection::Fail(absl::Status status) {
  if (PeerOf(status) < 0) status = WithPeer(Annotate(status, absl::StrCat("rank ", options_.peer)), options_.peer);
  bool first = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    first = status_.ok();
  }
  if (first) on_failure_(status);  // before the peer learns of it: its answer must not become the cause
  Abort(status);
}

absl::Status TcpConnection::Post(std::shared_ptr<Receive> receive) {
  std::unique_lock<std::mutex> lock(mutex_);
  auto waiting = ring_.find(receive->tag);
  if (waiting != ring_.end()) {
    if (static_cast<int64_t>(waiting->second.size()) != receive->buffer.bytes) {
      lock.unlock();
      Fail(absl::DataLossError(
          absl::StrCat("a message of ", waiting->second.size(), " bytes where ", receive->buffer.bytes, " were expected (", Name(receive->tag), ")")));
      lock.lock();
      return status_;
    }
    memcpy(receive->buffer.data, waiting->second.data(), waiting->second.size());
    ring_.erase(waiting);
    receive->done = true;
    ring_changed_.notify_all();
    return absl::OkStatus();
  }
  PPFT_RETURN_IF_ERROR(status_);
  if (!posted_.emplace(receive->tag, receive).second) return absl::InternalError(absl::StrCat("two receives of one message (", Name(receive->tag), ")"));
  ring_changed_.notify_all();
  return absl::OkStatus();
}

absl::Status TcpConnection::Wait(const Receive& receive) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool in_time = receive_changed_.wait_for(lock, Chrono(patience_), [&] { return receive.done || peer_said_goodbye_ || !status_.ok(); });
  if (receive.done) return absl::OkStatus();
  PPFT_RETURN_IF_ERROR(status_);
  if (in_time)
    return WithPeer(absl::UnavailableError(absl::StrCat("rank ", options_.peer, " has ended, but ", Name(receive.tag), " was still expected")), options_.peer);
  return WithPeer(absl::DeadlineExceededError(
                      absl::StrCat("rank ", options_.peer, " sent nothing for ", absl::FormatDuration(options_.stall_timeout), " (", Name(receive.tag), ")")),
                  options_.peer);
}

absl::Status TcpConnection::SendNow(Outgoing* out) {
  const int64_t total = kFrameHeaderBytes + out->buffer.bytes;
  while (out->done < total) {
    struct iovec parts[2];
    int count = 0;
    if (out->done < kFrameHeaderBytes) parts[count++] = {out->header.data() + out->done, static_cast<size_t>(kFrameHeaderBytes - out->done)};
    const int64_t payload_done = std::max<int64_t>(0, out->done - kFrameHeaderBytes);
    if (payload_done < out->buffer.bytes) {
      parts[count++] = {static_cast<char*>(out->buffer.data) + payload_done, static_cast<size_t>(out->buffer.bytes - payload_done)};
    }
    struct msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(count);
    const ssize_t n = sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return absl::OkStatus();
      return absl::UnavailableError(absl::StrCat("send: ", strerror(errno)));
    }
    out->done += n;
  }
  return absl::OkStatus();
}

absl::Status TcpConnection::Send(const Tag& tag, Buffer buffer) {
  FrameHeader header;
  header.channel = options_.channel;
  header.epoch = options_.epoch;
  header.tag = tag;
  header.payload_bytes = buffer.bytes;
  std::unique_lock<std::mutex> lock(mutex_);
  const bool room = send_changed_.wait_for(lock, Chrono(patience_),
                                           [&] { return static_cast<int>(queue_.size()) < options_.ring_frames || peer_said_goodbye_ || !status_.ok(); });
  PPFT_RETURN_IF_ERROR(status_);
  if (!room) {
    return WithPeer(absl::DeadlineExceededError(absl::StrCat("rank ", options_.peer, " took nothing for ", absl::FormatDuration(options_.stall_timeout))),
                    options_.peer);
  }
  if (peer_said_goodbye_) return WithPeer(absl::UnavailableError(absl::StrCat("rank ", options_.peer, " has ended")), options_.peer);
  counts_.sent_bytes += buffer.bytes;
  Outgoing out{EncodeFrameHeader(header), std::move(buffer)};
  if (queue_.empty() && !sending_) {
    // Most messages fit into the socket's buffer: no thread has to wake up for them. An error here comes back to the sender thread.
    if (SendNow(&out).ok() && out.done == kFrameHeaderBytes + out.buffer.bytes) return absl::OkStatus();
  }
  queue_.push_back(std::move(out));
  send_changed_.notify_all();
  return absl::OkStatus();
}

void TcpConnection::SendLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    const bool woken = send_changed_.wait_for(lock, Chrono(options_.peer_silence / 8), [&] { return !queue_.empty() || !status_.ok(); });
    if (!status_.ok()) break;
    if (!woken) {
      if (finishing_ || peer_said_goodbye_) continue;
      FrameHeader beat;
      beat.kind = FrameKind::kBeat;
      beat.channel = options_.channel;
      beat.epoch = options_.epoch;
      queue_.push_back(Outgoing{EncodeFrameHeader(beat), Buffer()});
    }
    Outgoing out = std::move(queue_.front());
    sending_ = true;
    lock.unlock();
    absl::Status status;
    if (out.done < kFrameHeaderBytes) {
      status = WriteExactly(fd_.get(), out.header.data() + out.done, kFrameHeaderBytes - out.done, absl::InfiniteFuture());
      out.done = kFrameHeaderBytes;
    }
    if (status.ok()) {
      const int64_t done = out.done - kFrameHeaderBytes;
      status = WriteExactly(fd_.get(), static_cast<const char*>(out.buffer.data) + done, out.buffer.bytes - done, absl::InfiniteFuture());
    }
    out.buffer = Buffer();
    if (!status.ok()) {
      Fail(status);
      lock.lock();
      break;
    }
    lock.lock();
    sending_ = false;
    queue_.pop_front();
    send_changed_.notify_all();
  }
  queue_.clear();
}

void TcpConnection::WaitWithoutLimit() {
  std::lock_guard<std::mutex> lock(mutex_);
  patience_ = absl::InfiniteDuration();
}

absl::Status TcpConnection::Finish() {
  FrameHeader header;
  header.kind = FrameKind::kGoodbye;
  header.channel = options_.channel;
  header.epoch = options_.epoch;
  std::unique_lock<std::mutex> lock(mutex_);
  PPFT_RETURN_IF_ERROR(status_);
  finishing_ = true;
  queue_.push_back(Outgoing{EncodeFrameHeader(header), Buffer()});
  send_changed_.notify_all();
  const bool in_time = send_changed_.wait_for(lock, Chrono(options_.stall_timeout), [&] { return queue_.empty() || !status_.ok(); });
  PPFT_RETURN_IF_ERROR(status_);
  if (!in_time)
    return WithPeer(absl::DeadlineExceededError(absl::StrCat("rank ", options_.peer, " took nothing for ", absl::FormatDuration(options_.stall_timeout))),
                    options_.peer);
  shutdown(fd_.get(), SHUT_WR);
  return absl::OkStatus();
}

void TcpConnection::ReceiveLoop() {
  bool goodbye = false;
  absl::Status status;
  while (status.ok() && !goodbye) status = ReceiveFrame(&goodbye);
  if (status.ok()) {
    std::lock_guard<std::mutex> lock(mutex_);
    peer_said_goodbye_ = true;
    receive_changed_.notify_all();
    send_changed_.notify_all();
    return;
  }
  Fail(status);
}

absl::Status TcpConnection::ReceiveFrame(bool* goodbye) {
  char bytes[kFrameHeaderBytes];
  const absl::Status read = ReadExactly(fd_.get(), bytes, kFrameHeaderBytes, absl::Now() + options_.peer_silence);
  if (absl::IsDeadlineExceeded(read)) {
    return WithPeer(
        absl::DeadlineExceededError(absl::StrCat("rank ", options_.peer, " gave no sign of life for ", absl::FormatDuration(options_.peer_silence))),
        options_.peer);
  }
  PPFT_RETURN_IF_ERROR(read);
  PPFT_ASSIGN_OR_RETURN(const FrameHeader header,
                        DecodeFrameHeader(absl::string_view(bytes, kFrameHeaderBytes), options_.epoch, options_.channel, options_.max_frame_bytes));
  if (header.kind == FrameKind::kAbort) {
    const int lost = header.tag.stage;
    return WithPeer(absl::UnavailableError(lost == options_.peer ? absl::StrCat("rank ", lost, " has failed")
                                                                 : absl::StrCat("rank ", options_.peer, " has lost its connection to rank ", lost)),
                    lost);
  }
  if (header.kind == FrameKind::kBeat) return absl::OkStatus();
  *goodbye = header.kind == FrameKind::kGoodbye;
  return *goodbye ? absl::OkStatus() : TakePayload(header);
}

absl::Status TcpConnection::TakePayload(const FrameHeader& header) {
  std::shared_ptr<Receive> receive;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    ring_changed_.wait(lock, [&] { return posted_.count(header.tag) != 0 || static_cast<int>(ring_.size()) < options_.ring_frames || !status_.ok(); });
    PPFT_RETURN_IF_ERROR(status_);
    if (ring_.count(header.tag) != 0) return absl::DataLossError(absl::StrCat("the same message twice (", Name(header.tag), ")"));
    auto found = posted_.find(header.tag);
    if (found != posted_.end()) receive = found->second;
  }
  std::vector<char> held;
  if (receive == nullptr) {
    held.resize(static_cast<size_t>(header.payload_bytes));
    PPFT_RETURN_IF_ERROR(ReadExactly(fd_.get(), held.data(), header.payload_bytes, absl::InfiniteFuture()));
  } else {
    if (header.payload_bytes != receive->buffer.bytes) {
      return absl::DataLossError(
          absl::StrCat("a message of ", header.payload_bytes, " bytes where ", receive->buffer.bytes, " were expected (", Name(header.tag), ")"));
    }
    PPFT_RETURN_IF_ERROR(ReadExactly(fd_.get(), static_cast<char*>(receive->buffer.data), header.payload_bytes, absl::InfiniteFuture()));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  counts_.received_bytes += header.payload_bytes;
  if (receive == nullptr) {
    // It may have been posted while its bytes came in.
    auto found = posted_.find(header.tag);
    if (found == posted_.end()) {
      ring_.emplace(header.tag, std::move(held));
      return absl::OkStatus();
    }
    receive = found->second;
    if (header.payload_bytes != receive->buffer.bytes) {
      return absl::DataLossError(
          absl::StrCat("a message of ", header.payload_bytes, " bytes where ", receive->buffer.bytes, " were expected (", Name(header.tag), ")"));
    }
    memcpy(receive->buffer.data, held.data(), held.size());
  }
  posted_.erase(header.tag);
  receive->done = true;
  receive_changed_.notify_all();
  return absl::OkStatus();
}

TransferCounts TcpConnection::counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

}  // namespace ppft::trainer
