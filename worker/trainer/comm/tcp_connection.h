// One established connection of the TCP transport: a queue of sends with its thread, a thread that receives, and the ring of frames that came before
// their receive was posted.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/files.h"
#include "worker/trainer/comm/frame.h"
#include "worker/trainer/comm/transport.h"

namespace ppft::trainer {

// One posted receive; lives until it was waited for.
struct Receive {
  Buffer buffer;
  int peer = -1;
  Tag tag;
  bool done = false;  // guarded by the connection's mutex
};

struct TcpConnectionOptions {
  int rank = 0;  // this side
  int peer = 0;
  Channel channel = Channel::kControl;
  int64_t epoch = 0;
  int ring_frames = 64;
  int64_t max_frame_bytes = int64_t{1} << 31;
  absl::Duration stall_timeout = absl::Seconds(300);
  absl::Duration peer_silence = absl::InfiniteDuration();  // finite: both sides send beats, and this one gives up without any for so long
};

class TcpConnection {
 public:
  // `on_failure` is called from one of the threads, with the status that ended the connection other than by the peer's goodbye.
  TcpConnection(Fd fd, const TcpConnectionOptions& options, std::function<void(const absl::Status&)> on_failure);
  ~TcpConnection();

  absl::Status Post(std::shared_ptr<Receive> receive);
  absl::Status Wait(const Receive& receive);
  absl::Status Send(const Tag& tag, Buffer buffer);
  // Wait and Send have no stall timeout any more.
  void WaitWithoutLimit();
  // Sends what is queued and the goodbye; waits until it has left.
  absl::Status Finish();
  // Every waiting and later call fails with `cause`; the threads end. The peer is told whom this rank has lost, so that it names the same one; not when
  // `cause` is CANCELLED.
  void Abort(const absl::Status& cause);

  TransferCounts counts() const;

 private:
  struct Outgoing {
    std::array<char, kFrameHeaderBytes> header;
    Buffer buffer;
    int64_t done = 0;  // bytes of header and payload that have left
  };

  void SendLoop();
  void ReceiveLoop();
  absl::Status ReceiveFrame(bool* goodbye);
  absl::Status TakePayload(const FrameHeader& header);
  void Fail(absl::Status status);
  // As much as the socket takes without waiting. The mutex is held: only for an empty queue.
  absl::Status SendNow(Outgoing* out);

  const Fd fd_;
  const TcpConnectionOptions options_;
  const std::function<void(const absl::Status&)> on_failure_;

  mutable std::mutex mutex_;
  std::condition_variable send_changed_;     // queue grew or shrank
  std::condition_variable receive_changed_;  // a receive completed
  std::condition_variable ring_changed_;     // room in the ring, or a receive was posted
  // Guarded by mutex_.
  absl::Status status_;
  absl::Duration patience_;  // of Wait and Send
  bool peer_said_goodbye_ = false;
  std::deque<Outgoing> queue_;  // the front is being sent
  bool sending_ = false;        // the sender thread works on the front
  bool finishing_ = false;      // the goodbye is the last frame
  std::map<Tag, std::shared_ptr<Receive>> posted_;
  std::map<Tag, std::vector<char>> ring_;
  TransferCounts counts_;

  std::thread sender_;
  std::thread receiver_;
};

}  // namespace ppft::trainer
