// ReplicaExchange of stages on a GPU: gatherings and sums run on the communicator's stream beside the computation, and nothing waits on the host.
// Errors: INTERNAL with NCCL's or CUDA's words; a failure of the device itself may show only where the host waits for it.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/trainer/comm/device/device_comm.h"
#include "worker/trainer/model/replica_exchange.h"

namespace ppft::trainer {

class DeviceReplicaExchange final : public ReplicaExchange {
 public:
  // `comm` of the replicas; outlives this object.
  DeviceReplicaExchange(DeviceComm* comm, int size, int index) : comm_(comm), size_(size), index_(index) {}

  int size() const override { return size_; }
  int index() const override { return index_; }
  absl::Status BeginGather(const at::Tensor& part, const at::Tensor& whole) override;
  absl::Status EndGather() override;
  absl::Status BeginSum(const at::Tensor& values, const std::vector<int64_t>& bounds, const at::Tensor& sum) override;
  absl::Status EndSum() override;

 private:
  DeviceComm* const comm_;
  const int size_;
  const int index_;
  uint64_t gathering_ = 0;
  uint64_t summing_ = 0;
  at::Tensor own_, sum_;
};

}  // namespace ppft::trainer
