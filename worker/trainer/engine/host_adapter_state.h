// AdapterState of stages in host memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/trainer/comm/collectives.h"
#include "worker/trainer/engine/adapter_state.h"
#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {

class HostAdapterState final : public AdapterState {
 public:
  // `stages` ascending, `replicas` the group of ranks that hold the same stages, `exchange` the same for sums during backward (zero_stage 2 and 3); all
  // outlive this object. INVALID_ARGUMENT for a parameter whose memory is not contiguous fp32.
  static absl::StatusOr<std::unique_ptr<AdapterState>> Create(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages, Group* replicas,
                                                              ReplicaExchange* exchange);

  absl::Status ReduceGradients() override;
  absl::StatusOr<std::vector<double>> Sums(const at::Tensor& loss_total) override;
  absl::Status Update(int64_t update, double learning_rate, double gradient_factor) override;
  absl::StatusOr<std::vector<NamedTensor>> CheckpointTensors() override;
  std::vector<float> CopyMasters() const override;
  void SetMasters(const std::vector<float>& values) override;
  int64_t moment_bytes() const override { return 2 * optimizer_.end() * static_cast<int64_t>(sizeof(float)); }

 private:
  HostAdapterState(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages, std::vector<ParameterSpan> spans,
                   std::vector<ParameterSpan> owned, std::vector<size_t> position, std::vector<int64_t> bounds, Group* replicas);

  void SetMoments(const std::vector<float>& exp_avg, const std::vector<float>& exp_avg_sq) override;
  // From the order of the parameters to that of the spans, or back.
  std::vector<float> Reordered(const std::vector<float>& values, bool to_flat) const;
  // The spans' values in one buffer and back.
  std::vector<float> Gathered(float* ParameterSpan::*where) const;
  void Scatter(const std::vector<float>& values, float* ParameterSpan::*where);
  void MastersChanged();

  int64_t begin() const { return sharded_ ? bounds_[static_cast<size_t>(replicas_->index())] : 0; }

  const bool sharded_;
  const bool gradients_sharded_;
  // In the order of the stages' flat buffers, so that what a stage shares out is what this rank updates.
  const std::vector<ParameterSpan> spans_;  // gradient null when the gradients are shared out
  const std::vector<ParameterSpan> owned_;  // by parameter: the part of it that this rank updates
  const std::vector<size_t> position_;      // of each parameter (by stage, in its order) among the spans
  const std::vector<int64_t> bounds_;       // [replicas + 1]: who updates what
  Group* const replicas_;
  int64_t size_ = 0;
  AdamW optimizer_;  // of owned_
};

}  // namespace ppft::trainer
