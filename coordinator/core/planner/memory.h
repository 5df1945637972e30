// What a rank needs in memory: an estimate from sizes alone, meant to be a little above the truth. PURE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "common/model/cost.h"
#include "common/pipeline/action.h"
#include "common/pipeline/simulator.h"
#include "ppft/v1/plan.pb.h"

namespace ppft::coordinator {

int64_t ComputeBytes(absl::string_view compute);  // of one element: fp32 4, bf16 and fp16 2

// Weights of a stage in the compute type, with the adapter's columns beside them ([W | sB]). A tied embedding that serves as the head too counts once.
int64_t StageWeightBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, int64_t compute_bytes);

// Kept for backward of one micro-batch by a stage.
int64_t StageActivationBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, int64_t tokens, int64_t compute_bytes);

struct RankMemoryInput {
  const model::ModelConfig& config;
  const std::vector<v1::StagePlan>& stages;  // of the whole replica; bytes filled in
  const pipeline::Program& program;          // of this rank
  const pipeline::Simulation& simulation;
  int pipeline_rank = 0;
  int64_t tokens = 0;
  int64_t compute_bytes = 4;
  absl::string_view kind;  // cpu | cuda
};

// Weights, adapter with moments, activations at their peak, receive buffers, temporaries of the largest operation, and the runtime itself.
int64_t RankPeakBytes(const RankMemoryInput& input);

// "1.5 GiB", "320 MiB".
std::string FormatBytes(int64_t bytes);

}  // namespace ppft::coordinator
