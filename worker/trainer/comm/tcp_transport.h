// Transport over TCP: one connection per pair of ranks and channel, one sender and one receiver thread per connection. Frames that come before their receive
// is posted wait in a bounded ring; when it is full the receiver stops reading, and TCP holds the sender back.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/files.h"
#include "worker/trainer/comm/transport.h"

namespace ppft::trainer {

struct TcpOptions {
  std::string job_id;
  int64_t epoch = 0;
  int rank = 0;
  int size = 1;
  absl::Duration stall_timeout = absl::Seconds(300);       // silence of a peer that is waited for
  absl::Duration connect_timeout = absl::Seconds(120);     // until all peers are there
  absl::Duration peer_silence = absl::InfiniteDuration();  // a peer whose process stands still for so long is lost; finite on all ranks or on none
  int ring_frames = 64;                                    // unclaimed and unsent frames per connection
  int64_t max_frame_bytes = int64_t{1} << 31;
};

// A channel to a peer. Both ends list it.
struct Link {
  int peer = 0;
  Channel channel = Channel::kControl;
};

// Bound before the peers are known, so that its address can be told to them.
class TcpListener {
 public:
  // `host` is a name or address of this machine ("" = all); the port is chosen by the system.
  static absl::StatusOr<TcpListener> Open(const std::string& host);
  // "HOST:PORT", "[HOST]:PORT" for IPv6.
  const std::string& address() const { return address_; }
  int fd() const { return fd_.get(); }

 private:
  Fd fd_;
  std::string address_;
};

// Of each pair the higher rank dials. Returns once all links stand. UNAVAILABLE or DEADLINE_EXCEEDED with PeerOf for a peer that is not there,
// FAILED_PRECONDITION with its reason for one that refuses (another job or epoch). `endpoints` are indexed by rank.
absl::StatusOr<std::unique_ptr<Transport>> ConnectTcp(TcpListener listener, const TcpOptions& options, const std::vector<std::string>& endpoints,
                                                      const std::vector<Link>& links);

}  // namespace ppft::trainer
