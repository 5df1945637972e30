#include "worker/trainer/engine/host_replica_exchange.h"

#include <memory>

#include "common/base/status.h"

namespace ppft::trainer {

absl::Status HostReplicaExchange::BeginGather(const at::Tensor& part, const at::Tensor& whole) {
  const auto bytes = static_cast<int64_t>(part.nbytes());
  if (gathering_.has_value() || static_cast<int64_t>(whole.nbytes()) != bytes * size()) {
    return absl::InternalError("a gathering over the replicas has the wrong size or time");
  }
  whole.narrow(0, index() * part.numel(), part.numel()).copy_(part);
  Buffer own;
  auto owner = std::make_shared<at::Tensor>(part);
  own.data = owner->data_ptr();
  own.bytes = bytes;
  own.owner = owner;
  PPFT_ASSIGN_OR_RETURN(gathering_, group_.BeginAllGather(std::move(own), static_cast<char*>(whole.data_ptr())));
  return absl::OkStatus();
}

absl::Status HostReplicaExchange::EndGather() {
  if (!gathering_.has_value()) return absl::InternalError("no gathering over the replicas is under way");
  const Group::Gathering gathering = *std::move(gathering_);
  gathering_.reset();
  return group_.End(gathering);
}

absl::Status HostReplicaExchange::BeginSum(const at::Tensor& values, const std::vector<int64_t>& bounds, const at::Tensor& sum) {
  if (summing_.has_value()) return absl::InternalError("a sum over the replicas is under way");
  sum_ = sum;
  PPFT_ASSIGN_OR_RETURN(summing_, group_.BeginReduceScatter(absl::MakeConstSpan(values.data_ptr<float>(), static_cast<size_t>(values.numel())), bounds));
  return absl::OkStatus();
}

absl::Status HostReplicaExchange::EndSum() {
  if (!summing_.has_value()) return absl::InternalError("no sum over the replicas is under way");
  const Group::Summing summing = *std::move(summing_);
  summing_.reset();
  own_.resize(static_cast<size_t>(sum_.numel()));
  PPFT_RETURN_IF_ERROR(group_.End(summing, absl::MakeSpan(own_)));
  float* const out = sum_.data_ptr<float>();
  for (size_t k = 0; k < own_.size(); ++k) out[k] += own_[k];
  return absl::OkStatus();
}

}  // namespace ppft::trainer
