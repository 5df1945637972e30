#include "worker/trainer/model/sharded_weights.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "common/base/status.h"

namespace ppft::trainer {
namespace {

// Parts begin at whole words whatever the type, as transports want them.
constexpr int64_t kPartMultiple = 8;

int64_t PartSize(int64_t layer_size, int replicas) {
  const int64_t least = (layer_size + replicas - 1) / replicas;
  return (least + kPartMultiple - 1) / kPartMultiple * kPartMultiple;
}

}  // namespace

ShardedWeights::ShardedWeights(size_t num_layers, int64_t layer_size, int replicas, int index, const at::TensorOptions& compute)
    : layer_size_(layer_size), part_size_(PartSize(layer_size, replicas)), index_(index), parts_(num_layers) {
  for (Slot& slot : slots_) slot.buffer = at::zeros({replicas * part_size_}, compute);
}

void ShardedWeights::Keep(size_t layer) { parts_[layer] = slots_[0].buffer.narrow(0, index_ * part_size_, part_size_).clone(); }

absl::Status ShardedWeights::Begin(int layer) {
  Slot& slot = slots_[1 - used_];
  slot.layer = layer;
  gathering_ = true;
  return replicas_->BeginGather(parts_[static_cast<size_t>(layer)], slot.buffer);
}

absl::StatusOr<at::Tensor> ShardedWeights::Use(int layer, int next) {
  if (slots_[used_].layer != layer) {
    // A layer that was fetched for nothing still has to arrive before its buffer is filled again.
    if (gathering_ && slots_[1 - used_].layer != layer) PPFT_RETURN_IF_ERROR(replicas_->EndGather());
    if (slots_[1 - used_].layer != layer) PPFT_RETURN_IF_ERROR(Begin(layer));
    if (gathering_) PPFT_RETURN_IF_ERROR(replicas_->EndGather());
    gathering_ = false;
    used_ = 1 - used_;
  }
  if (next >= 0 && slots_[1 - used_].layer != next) {
    if (gathering_) PPFT_RETURN_IF_ERROR(replicas_->EndGather());
    PPFT_RETURN_IF_ERROR(Begin(next));
  }
  return Whole(used_);
}

int64_t ShardedWeights::held_bytes() const {
  int64_t bytes = 0;
  for (const at::Tensor& part : parts_) bytes += static_cast<int64_t>(part.nbytes());
  for (const Slot& slot : slots_) bytes += static_cast<int64_t>(slot.buffer.nbytes());
  return bytes;
}

}  // namespace ppft::trainer
