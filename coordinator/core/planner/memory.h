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

// What a rank shares with its replicas or makes again instead of keeping it.
struct MemorySaving {
  int zero_stage = 0;  // 1: moments, 2: gradients too, 3: the layers' weights too are shared out over the replicas
  int replicas = 1;
  std::string activation_checkpointing = "none";  // none | selective | full
};

// Weights of a stage in the compute type, with the adapter's columns beside them ([W | sB]). A tied embedding that serves as the head too counts once.
// Shared out: this rank's part of each layer, and two whole layers' room to gather them into; embedding and head stay whole.
int64_t StageWeightBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, int64_t compute_bytes,
                         const MemorySaving& saving);

// Masters, gradients and two moments of a stage's adapters, all fp32. Shared out gradients need room for two whole layers'.
int64_t StageAdapterBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, const MemorySaving& saving);

// Kept for backward of one micro-batch by a stage.
int64_t StageActivationBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, int64_t tokens, int64_t compute_bytes,
                             const MemorySaving& saving);

struct RankMemoryInput {
  const model::ModelConfig& config;
  const std::vector<v1::StagePlan>& stages;  // of the whole replica; bytes filled in
  const pipeline::Program& program;          // of this rank
  const pipeline::Simulation& simulation;
  int pipeline_rank = 0;
  int64_t tokens = 0;
  int64_t compute_bytes = 4;
  absl::string_view kind;  // cpu | cuda
  const model::LoraShape& lora;
  const MemorySaving& saving;
};

// Weights, adapter with moments, activations at their peak, receive buffers, temporaries of the largest operation, and the runtime itself.
int64_t RankPeakBytes(const RankMemoryInput& input);

// "1.5 GiB", "320 MiB".
std::string FormatBytes(int64_t bytes);

}  // namespace ppft::coordinator
