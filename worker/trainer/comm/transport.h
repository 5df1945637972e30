// Messages between the ranks of a gang. The names say what is moved, not how: TCP here, NCCL in the CUDA plugin.
//
// Two ranks talk over channels; a message is named by its tag, and a receive takes the message of its tag, whatever came before it on that channel.
// Errors carry the rank that was not reachable (PeerOf) and are final: after one, every call fails with the first cause. A peer that dies or closes is an
// error, never a hang; a peer that stays silent is one after the stall timeout, until WaitWithoutLimit.
// Thread: one thread at a time, but for Abort.
#pragma once

#include <cstdint>
#include <memory>
#include <tuple>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft::trainer {

enum class Channel : uint8_t {
  kControl = 0,      // collectives, small messages
  kActivations = 1,  // down the pipeline
  kGradients = 2,    // up the pipeline
};
inline constexpr int kNumChannels = 3;

// Equal on both ends; unique among a pair's messages of one channel that are under way.
struct Tag {
  int64_t pass = 0;   // counts program runs (a training step, an evaluation, a collective), the same on all ranks
  int32_t stage = 0;  // that sends
  int32_t microbatch = 0;

  friend bool operator<(const Tag& a, const Tag& b) { return std::tie(a.pass, a.stage, a.microbatch) < std::tie(b.pass, b.stage, b.microbatch); }
  friend bool operator==(const Tag& a, const Tag& b) { return a.pass == b.pass && a.stage == b.stage && a.microbatch == b.microbatch; }
};

// Contiguous memory on the transport's device. `owner` keeps it alive until the transfer is done.
struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  std::shared_ptr<void> owner;
};

using Ticket = uint64_t;

struct TransferCounts {
  int64_t sent_bytes = 0;  // payload
  int64_t received_bytes = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Announces where the message goes; it is written there as soon as it comes. The message has to have exactly buffer.bytes (DATA_LOSS otherwise).
  virtual absl::StatusOr<Ticket> PostReceive(int peer, Channel channel, const Tag& tag, Buffer buffer) = 0;
  // Queues the message; the memory must not change until it has left. Waits only while the peer's queue is full.
  virtual absl::Status Send(int peer, Channel channel, const Tag& tag, Buffer buffer) = 0;
  // Until the receive is complete.
  virtual absl::Status Wait(Ticket ticket) = 0;

  // From here on a peer may stay silent: it does what takes as long as it takes. One that dies, closes, or whose process gives no sign of life where that is
  // asked for, is still an error.
  virtual void WaitWithoutLimit() = 0;

  // All sends have left, the peers are told that the end is regular, the connections are closed.
  virtual absl::Status Close() = 0;
  // Any thread: every pending and later call fails with `cause`.
  virtual void Abort(const absl::Status& cause) = 0;

  // Any thread: OK, or the first cause. Memory that came from a device's transfer counts only while this is OK.
  virtual absl::Status status() const = 0;
  virtual TransferCounts counts() const = 0;
};

// `status` with the rank that it is about, and back (-1 if none is named).
absl::Status WithPeer(absl::Status status, int peer);
int PeerOf(const absl::Status& status);

}  // namespace ppft::trainer
