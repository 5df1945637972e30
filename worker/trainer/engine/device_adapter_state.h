// AdapterState of stages on a GPU: masters, gradients and moments stay there, and nothing but Sums waits for it.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/trainer/comm/device/device_comm.h"
#include "worker/trainer/cuda/plugin.h"
#include "worker/trainer/engine/adapter_state.h"
#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {

// The replicas of a device's stages; `comm` is null for one.
struct DeviceReplicas {
  DeviceComm* comm = nullptr;
  int index = 0;
  int size = 1;
};

class DeviceAdapterState final : public AdapterState {
 public:
  // `stages` ascending, `exchange` of the replicas for sums during backward (zero_stage 2 and 3); all outlive this object, and so does `cuda`.
  static absl::StatusOr<std::unique_ptr<AdapterState>> Create(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages, CudaRuntime* cuda,
                                                              const DeviceReplicas& replicas, ReplicaExchange* exchange);

  absl::Status ReduceGradients() override;
  absl::StatusOr<std::vector<double>> Sums(const at::Tensor& loss_total) override;
  absl::Status Update(int64_t update, double learning_rate, double gradient_factor) override;
  absl::StatusOr<std::vector<NamedTensor>> CheckpointTensors() override;
  std::vector<float> CopyMasters() const override;
  void SetMasters(const std::vector<float>& values) override;
  int64_t moment_bytes() const override;

 private:
  // The flat buffers of one stage.
  struct Part {
    StageModel* stage = nullptr;
    at::Tensor master;            // [n] fp32
    at::Tensor gradient;          // [n] fp32; this rank's part alone when the stage shares out its gradients
    std::vector<FlatSpan> spans;  // by parameter
    std::vector<int64_t> bounds;  // [replicas + 1]: who updates what
    std::unique_ptr<DeviceOptimizer> optimizer;
  };

  DeviceAdapterState(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages, const DeviceReplicas& replicas);

  absl::Status AddPart(StageModel* stage, CudaRuntime* cuda, ReplicaExchange* exchange);
  int64_t begin(const Part& part) const { return sharded_ ? part.bounds[static_cast<size_t>(replicas_.index)] : 0; }

  void SetMoments(const std::vector<float>& exp_avg, const std::vector<float>& exp_avg_sq) override;
  void Gather(const Part& part, const at::Tensor& values);
  // Flat buffers of a device, one per part, as the parameters' values one after another, and back.
  std::vector<float> ToHost(const std::vector<at::Tensor>& flat) const;
  std::vector<at::Tensor> FromHost(const std::vector<float>& values) const;

  const AdamWOptions options_;
  const bool sharded_;
  const bool gradients_sharded_;
  const DeviceReplicas replicas_;
  std::vector<Part> parts_;
};

}  // namespace ppft::trainer
