// The trainable state of one rank: the LoRA masters and gradients of its stages, the AdamW moments of its shard, the copy of the best adapter. With data
// parallelism and zero_stage 0 every replica updates everything; from 1 on each updates a range of the flat buffer and the ranges are gathered.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/trainer/checkpoint/tensor_file.h"
#include "worker/trainer/comm/collectives.h"
#include "worker/trainer/engine/config.h"
#include "worker/trainer/model/stage_model.h"
#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {

class AdapterState {
 public:
  // `stages` ascending, `replicas` the group of ranks that hold the same stages; both outlive this object. INVALID_ARGUMENT for a parameter whose memory
  // is not contiguous fp32.
  static absl::StatusOr<std::unique_ptr<AdapterState>> Create(const AdamWOptions& options, int zero_stage, std::vector<StageModel*> stages, Group* replicas);

  int64_t num_parameters() const { return static_cast<int64_t>(spans_.size()); }
  const std::vector<ParameterSpan>& parameters() const { return spans_; }

  // Sums the gradients over the replicas: afterwards this rank's range holds the sum (zero_stage 0: everything).
  absl::Status ReduceGradients();
  // Per parameter, over the part of it that this rank answers for, so that the sum over all ranks counts each element once.
  std::vector<double> SquaresOfGradients() const;
  // One AdamW update; afterwards all replicas hold the same masters.
  absl::Status Update(int64_t update, double learning_rate, double gradient_factor);
  void ZeroGradients();

  // Masters, or masters and moments ("exp_avg.", "exp_avg_sq." before the key). Collective over the replicas.
  absl::StatusOr<std::vector<NamedTensor>> CheckpointTensors();
  absl::Status Restore(const TensorSource& source);
  // Masters alone. INVALID_ARGUMENT or DATA_LOSS names the tensor; the masters are then unchanged.
  absl::Status LoadMasters(const TensorSource& source);

  void KeepBest() { best_ = CopyMasters(); }
  bool has_best() const { return !best_.empty(); }
  absl::Status LoadBestFrom(const TensorSource& source);
  // Makes the best copy the masters.
  void UseBest() { SetMasters(best_); }

  std::vector<float> CopyMasters() const;
  void SetMasters(const std::vector<float>& values);

 private:
  AdapterState(const AdamWOptions& options, bool sharded, std::vector<StageModel*> stages, std::vector<ParameterSpan> spans, std::vector<int64_t> bounds,
               Group* replicas);

  // The spans' values in one buffer and back.
  std::vector<float> Gathered(float* ParameterSpan::*where) const;
  void Scatter(const std::vector<float>& values, float* ParameterSpan::*where);
  // One tensor per parameter from `source` under prefix + key, as a flat buffer.
  absl::StatusOr<std::vector<float>> ReadAll(const TensorSource& source, const std::string& prefix) const;
  void MastersChanged();

  const bool sharded_;
  const std::vector<StageModel*> stages_;
  const std::vector<ParameterSpan> spans_;
  const std::vector<int64_t> bounds_;  // [replicas + 1]: who updates what
  Group* const replicas_;
  int64_t size_ = 0;
  AdamW optimizer_;
  std::vector<float> best_;
};

}  // namespace ppft::trainer
