// Transport for memory on devices. Activations and gradients go through communicators of the CUDA plugin, one per direction of each neighbour pair; the
// control channel, the exchange of ids and the watch over the peers stay with a transport of the host.
//
// Messages of one direction arrive in the order in which both ends name them: SEND and RECV of a lowered program are in that order. Send and Wait queue work
// behind what the caller's current stream holds and return at once; after Wait the stream, not the host, has the message.
// A receive is queued on the device by its Wait, not by PostReceive: one that waits there for its peer holds multiprocessors that the computation needs (on two
// H200s a backward pass took 11 instead of 8 ms), while a sender goes on as soon as its message lies in the peer's buffers.
//
// A thread of this object watches the host transport and the communicators. A lost peer sets the status first and then aborts all communicators in one
// group, so that a stuck device goes on with garbage; whoever has waited for the device must ask status() before it uses what it got;
// status() asks the communicators, too.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/trainer/comm/device/device_comm.h"
#include "worker/trainer/comm/transport.h"

namespace ppft::trainer {

// One direction between two ranks.
struct DeviceLink {
  Channel channel = Channel::kActivations;
  int from = 0;
  int to = 0;
};

struct DeviceTransportOptions {
  std::vector<DeviceLink> links;  // of this rank
  std::vector<int> group;         // ranks that hold the same stages, this one among them; a communicator of its own from two on
  // Messages of a channel that are held at once: before one more the device waits until the oldest has been received and its memory is free. As receives are
  // queued late, pipeline_parallel_size + 1 are needed, and enough for every schedule (tests/common/pipeline/schedule_test).
  size_t sends_held = 3;
  absl::Duration init_timeout = absl::Seconds(60);
};

class DeviceTransport : public Transport {
 public:
  // `host` stands and carries the control channel; `comms` outlives this object. UNAVAILABLE or DEADLINE_EXCEEDED with PeerOf for a communicator that did not
  // come about; the process must then end, for a thread may still be waiting in it.
  static absl::StatusOr<std::unique_ptr<DeviceTransport>> Connect(std::unique_ptr<Transport> host, DeviceComms* comms, const DeviceTransportOptions& options);

  // Of the group; nullptr for a group of one.
  virtual DeviceComm* group() = 0;
  virtual int group_index() const = 0;
};

}  // namespace ppft::trainer
