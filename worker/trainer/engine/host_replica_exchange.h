// ReplicaExchange of stages in host memory, over a Group. Errors: the Group's; INTERNAL for what is begun twice, or ended and not begun.
#pragma once

#include <optional>

#include "worker/trainer/comm/collectives.h"
#include "worker/trainer/model/replica_exchange.h"

namespace ppft::trainer {

class HostReplicaExchange final : public ReplicaExchange {
 public:
  // The group is this object's alone.
  explicit HostReplicaExchange(Group group) : group_(std::move(group)) {}

  int size() const override { return group_.size(); }
  int index() const override { return group_.index(); }
  absl::Status BeginGather(const at::Tensor& part, const at::Tensor& whole) override;
  absl::Status EndGather() override;
  absl::Status BeginSum(const at::Tensor& values, const std::vector<int64_t>& bounds, const at::Tensor& sum) override;
  absl::Status EndSum() override;

 private:
  Group group_;
  std::optional<Group::Gathering> gathering_;
  std::optional<Group::Summing> summing_;
  at::Tensor sum_;
  std::vector<float> own_;
};

}  // namespace ppft::trainer
