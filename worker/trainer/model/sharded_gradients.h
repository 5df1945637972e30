// The gradients of a stage's adapters, shared out over its replicas (ZeRO 2 and 3, 1910.02054): the layers' whole gradients lie in two buffers in turn, and a
// replica keeps its part of the sums. A layer's sum goes on while the next one's backward pass runs.
//
// Thread: one at a time. All replicas go back through the same layers in the same order. Errors: the exchange's; after one the object is spent.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "worker/trainer/model/replica_exchange.h"

namespace ppft::trainer {

class ShardedGradients {
 public:
  // `replicas` outlives this object. This replica keeps elements [bounds[index], bounds[index + 1]) of all gradients; those of layer i are
  // [layer_offset[i], layer_offset[i + 1]).
  ShardedGradients(ReplicaExchange* replicas, std::vector<int64_t> bounds, std::vector<int64_t> layer_offset, const at::TensorOptions& acc);

  // Where layer i's backward pass adds: at least as many elements as it has.
  const at::Tensor& OfLayer(size_t i) const { return layers_[i % layers_.size()]; }
  // Around that pass. EndSum closes the last one of a micro-batch.
  void Begin(size_t i) { layers_[i % layers_.size()].zero_(); }
  absl::Status Sum(size_t i);
  absl::Status EndSum();

  const at::Tensor& shard() const { return shard_; }
  int64_t held_bytes() const;

 private:
  ReplicaExchange* const replicas_;
  const std::vector<int64_t> bounds_;
  const std::vector<int64_t> layer_offset_;
  std::array<at::Tensor, 2> layers_;
  at::Tensor shard_;
  bool summing_ = false;
};

}  // namespace ppft::trainer
