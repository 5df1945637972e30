// The trainable state of one rank: the LoRA masters and gradients of its stages, the AdamW moments of its shard, the copy of the best adapter. With data
// parallelism and zero_stage 0 every replica updates everything; from 1 on each updates a range of the flat buffer and the ranges are gathered (ZeRO,
// 1910.02054).
//
// Two homes: host_adapter_state.h for stages in host memory, device_adapter_state.h for stages on a GPU.
//
// Thread: the trainer's, one at a time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/trainer/checkpoint/tensor_file.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

class AdapterState {
 public:
  virtual ~AdapterState() = default;

  // Sums the gradients over the replicas: afterwards this rank's range holds the sum (zero_stage 0: everything).
  virtual absl::Status ReduceGradients() = 0;
  // First `loss_total` ([1] fp64 where the stages live; 0 if undefined), then per parameter the square of its gradient over the part of it that this rank
  // answers for, so that the sum over all ranks counts each element once. On a device the step's one wait.
  virtual absl::StatusOr<std::vector<double>> Sums(const at::Tensor& loss_total) = 0;
  // One AdamW update; afterwards all replicas hold the same masters.
  virtual absl::Status Update(int64_t update, double learning_rate, double gradient_factor) = 0;
  void ZeroGradients();

  // Masters and moments ("exp_avg.", "exp_avg_sq." before the key), on the host. Collective over the replicas.
  virtual absl::StatusOr<std::vector<NamedTensor>> CheckpointTensors() = 0;
  absl::Status Restore(const TensorSource& source);
  // Masters alone. INVALID_ARGUMENT or DATA_LOSS names the tensor; the masters are then unchanged.
  absl::Status LoadMasters(const TensorSource& source);

  void KeepBest() { best_ = CopyMasters(); }
  bool has_best() const { return !best_.empty(); }
  absl::Status LoadBestFrom(const TensorSource& source);
  // Makes the best copy the masters.
  void UseBest() { SetMasters(best_); }

  virtual int64_t moment_bytes() const { return 0; }  // held by this rank

  // All parameters one after another, in the order of the stages.
  virtual std::vector<float> CopyMasters() const = 0;
  virtual void SetMasters(const std::vector<float>& values) = 0;

 protected:
  explicit AdapterState(std::vector<StageModel*> stages) : stages_(std::move(stages)) {}

  virtual void SetMoments(const std::vector<float>& exp_avg, const std::vector<float>& exp_avg_sq) = 0;
  std::vector<Parameter> parameters() const;

  const std::vector<StageModel*> stages_;  // ascending

 private:
  // One tensor per parameter from `source` under prefix + key, as a flat buffer.
  absl::StatusOr<std::vector<float>> ReadAll(const TensorSource& source, const std::string& prefix) const;

  std::vector<float> best_;
};

}  // namespace ppft::trainer
