// What a rank needs in memory: an estimate from sizes alone, meant to be a little above the truth. PURE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "common/model/cost.h"
#include "common/model/memory.h"
#include "common/pipeline/action.h"
#include "common/pipeline/simulator.h"
#include "ppft/v1/plan.pb.h"

namespace ppft::coordinator {

int64_t ComputeBytes(absl::string_view compute);  // of one element: fp32 4, bf16 and fp16 2

model::StageMemory StageMemoryOf(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage,
                                 const model::StageMemoryOptions& options);

struct RankMemoryInput {
  const model::ModelConfig& config;
  const model::LoraShape& lora;
  const model::StageMemoryOptions& options;
  const std::vector<v1::StagePlan>& stages;  // of the whole replica
  const pipeline::Program& program;          // of this rank
  const pipeline::Simulation& simulation;
  int pipeline_rank = 0;
  bool merges = false;    // the export writes a merged model
  bool verifies = false;  // the export sends a probe through the model
};

// Every part of a rank: its stages, messages to and from its neighbours as the schedule holds them, and the runtime itself.
v1::MemoryEstimate RankMemory(const RankMemoryInput& input);
int64_t TotalBytes(const v1::MemoryEstimate& memory);

}  // namespace ppft::coordinator
