// The frozen matrices of a stage's layers, shared out over its replicas (ZeRO 3, 1910.02054): each keeps an even part of every layer. A layer is gathered just
// before it is used, the next one in the background, into two buffers that all layers of the stage use in turn.
//
// Thread: one at a time. All replicas ask for the same layers in the same order. Errors: the exchange's; after one the object is spent.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/trainer/model/replica_exchange.h"

namespace ppft::trainer {

class ShardedWeights {
 public:
  // layer_size: elements of a layer's matrices, one after another. `replicas` parts, of which this is number `index`.
  ShardedWeights(size_t num_layers, int64_t layer_size, int replicas, int index, const at::TensorOptions& compute);

  // Loading: fill Buffer() with a layer, then Keep its part.
  at::Tensor Buffer() { return Whole(0); }
  void Keep(size_t layer);

  // Before the first Use.
  void Attach(ReplicaExchange* replicas) { replicas_ = replicas; }
  // The layer's matrices, [layer_size], until the next Use but one. `next` (or -1) is the layer that the next call will ask for.
  absl::StatusOr<at::Tensor> Use(int layer, int next);

  int64_t held_bytes() const;

 private:
  struct Slot {
    at::Tensor buffer;  // [replicas * part]
    int layer = -1;
  };

  at::Tensor Whole(size_t slot) const { return slots_[slot].buffer.narrow(0, 0, layer_size_); }
  // Into the buffer that is not in use.
  absl::Status Begin(int layer);

  const int64_t layer_size_;
  const int64_t part_size_;
  const int index_;
  ReplicaExchange* replicas_ = nullptr;
  std::vector<at::Tensor> parts_;  // by layer, [part_size]
  std::array<Slot, 2> slots_;
  size_t used_ = 1;         // the slot of the last Use
  bool gathering_ = false;  // into the other slot
};

}  // namespace ppft::trainer
