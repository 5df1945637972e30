// A stage's tensors as HF has them, with the adapter merged in: W + scale * B A in fp32, then cast.
//
// Thread: that of the stage.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/model/config.h"
#include "common/model/inventory.h"
#include "worker/trainer/model/decoder_layer.h"
#include "worker/trainer/model/loss_head.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// What a stage is made of; all outlive this.
struct StageParts {
  const model::ModelConfig& config;
  const StageOptions& options;
  const TensorSource& source;   // the base model's, for what the stage does not hold to the last digit
  const at::Tensor& embedding;  // undefined where the stage has none
  const std::vector<std::unique_ptr<DecoderLayer>>& layers;
  const LossHead* head = nullptr;  // null where the stage has none
};

// Calls `visit` for each tensor, on the host and contiguous, in the order of MergedTensorsOf. The first error ends it.
absl::Status ForEachMergedTensor(const StageParts& stage, at::ScalarType dtype,
                                 const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit);
// Their names and shapes.
std::vector<model::ExpectedTensor> MergedTensorsOf(const StageParts& stage);

}  // namespace ppft::trainer
