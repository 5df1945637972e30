#include "worker/trainer/engine/device_replica_exchange.h"

#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {

absl::Status DeviceReplicaExchange::BeginGather(const at::Tensor& part, const at::Tensor& whole) {
  return CatchTorch("gathering over the replicas", [&]() -> absl::Status {
    const auto words = static_cast<int64_t>(part.nbytes() / sizeof(float));  // the bits are moved, whatever their type
    std::vector<int64_t> bounds;
    for (int i = 0; i <= size_; ++i) bounds.push_back(i * words);
    whole.narrow(0, index_ * part.numel(), part.numel()).copy_(part);
    gathering_ = comm_->AllGather(static_cast<float*>(whole.data_ptr()), bounds);
    return absl::OkStatus();
  });
}

absl::Status DeviceReplicaExchange::EndGather() {
  return CatchTorch("gathering over the replicas", [&]() -> absl::Status {
    comm_->WaitOnStream(gathering_);
    return absl::OkStatus();
  });
}

absl::Status DeviceReplicaExchange::BeginSum(const at::Tensor& values, const std::vector<int64_t>& bounds, const at::Tensor& sum) {
  return CatchTorch("sum over the replicas", [&]() -> absl::Status {
    const auto me = static_cast<size_t>(index_);
    own_ = values.narrow(0, bounds[me], bounds[me + 1] - bounds[me]);
    sum_ = sum;
    summing_ = comm_->ReduceScatter(values.data_ptr<float>(), bounds);
    return absl::OkStatus();
  });
}

absl::Status DeviceReplicaExchange::EndSum() {
  return CatchTorch("sum over the replicas", [&]() -> absl::Status {
    comm_->WaitOnStream(summing_);
    sum_.add_(own_);
    return absl::OkStatus();
  });
}

}  // namespace ppft::trainer
