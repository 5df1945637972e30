#include "worker/trainer/model/sharded_gradients.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "common/base/status.h"

namespace ppft::trainer {

ShardedGradients::ShardedGradients(ReplicaExchange* replicas, std::vector<int64_t> bounds, std::vector<int64_t> layer_offset, const at::TensorOptions& acc)
    : replicas_(replicas), bounds_(std::move(bounds)), layer_offset_(std::move(layer_offset)) {
  int64_t largest = 0;
  for (size_t i = 0; i + 1 < layer_offset_.size(); ++i) largest = std::max(largest, layer_offset_[i + 1] - layer_offset_[i]);
  const auto me = static_cast<size_t>(replicas_->index());
  for (at::Tensor& buffer : layers_) buffer = at::zeros({largest}, acc);
  shard_ = at::zeros({bounds_[me + 1] - bounds_[me]}, acc);
}

absl::Status ShardedGradients::Sum(size_t i) {
  PPFT_RETURN_IF_ERROR(EndSum());
  const int64_t begin = layer_offset_[i], end = layer_offset_[i + 1];
  std::vector<int64_t> bounds;
  for (const int64_t bound : bounds_) bounds.push_back(std::clamp(bound, begin, end) - begin);
  const auto me = static_cast<size_t>(replicas_->index());
  const int64_t first = std::clamp(bounds_[me], begin, end) - bounds_[me];
  const at::Tensor sum = shard_.narrow(0, bounds[me] == bounds[me + 1] ? 0 : first, bounds[me + 1] - bounds[me]);
  summing_ = true;
  return replicas_->BeginSum(OfLayer(i).narrow(0, 0, end - begin), bounds, sum);
}

absl::Status ShardedGradients::EndSum() {
  if (!summing_) return absl::OkStatus();
  summing_ = false;
  return replicas_->EndSum();
}

int64_t ShardedGradients::held_bytes() const {
  int64_t bytes = static_cast<int64_t>(shard_.nbytes());
  for (const at::Tensor& buffer : layers_) bytes += static_cast<int64_t>(buffer.nbytes());
  return bytes;
}

}  // namespace ppft::trainer
