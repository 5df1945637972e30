// How one replica of a job is cut: stages, schedule, programs and bytes per pipeline rank, before any device is chosen. PURE.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "common/pipeline/action.h"
#include "common/pipeline/schedule.h"
#include "common/pipeline/simulator.h"
#include "ppft/v1/job.pb.h"
#include "ppft/v1/plan.pb.h"
#include "ppft/v1/spec.pb.h"

namespace ppft::coordinator {

// What the planner knows of the prepared data and of the devices.
struct PlanFacts {
  double supervised_ratio = 1;  // supervised tokens / tokens, (0, 1]; 1 when not known: only those rows reach the head
  int64_t longest_row = 0;      // tokens; 0 when not known
  int64_t documents = 0;        // of a packed micro-batch, at most; 0 when not known, taken as micro_batch_size
  bool flash = false;           // cuda: attention through flash, for which all of these count
  bool deterministic = false;   // cuda
};

struct Layout {
  int data_parallel_size = 1;
  int pipeline_size = 1;
  int virtual_stages = 1;
  pipeline::ScheduleKind schedule = pipeline::ScheduleKind::k1F1B;
  int num_microbatches = 1;       // per step and replica
  int microbatches_per_pass = 1;  // consecutive ones that go through the model together
  std::string compute;            // fp32 | bf16 | fp16
  int64_t microbatch_tokens = 0;  // capacity
  std::string checkpointing;      // none | selective | full
  std::vector<v1::StagePlan> stages;
  std::vector<pipeline::Program> programs;  // per pipeline rank, with transfers
  pipeline::Simulation simulation;          // with the stages' FLOPs as costs
  std::vector<v1::MemoryEstimate> memory;   // per pipeline rank
  std::vector<int64_t> peak_bytes;          // per pipeline rank: the sum of its memory
  double imbalance = 1;                     // costliest rank over the mean
  double head_layers = 0;                   // the head's cost in layers

  int num_ranks() const { return data_parallel_size * pipeline_size; }
  int num_passes() const { return (num_microbatches + microbatches_per_pass - 1) / microbatches_per_pass; }
  int64_t largest_rank_bytes() const;
};

// What in `spec` contradicts itself or the model, whatever the devices: more stages than layers, layers_per_stage that do not add up, too few
// micro-batches for the schedule, a global batch that does not divide. All at once, with field and remedy. Empty: some layout exists.
// `wrong`: fields whose values are no good by themselves ("parallel.virtual_stages"); what hangs on them is not judged.
std::vector<v1::Violation> CheckLayout(const v1::JobSpec& spec, const model::ModelConfig& config, const std::set<std::string>& wrong = {});

// Pipeline sizes that `spec` allows, ascending: the one that it names, or, for auto, those up to `max_size` (at least one).
std::vector<int> PipelineSizes(const v1::JobSpec& spec, const model::ModelConfig& config, int max_size);

// Tokens of a row at most: what the job says, or its default for the model.
int64_t SequenceLength(const v1::JobSpec& spec, const model::ModelConfig& config);

// Micro-batches of a step that gain by going through the model together, if the memory suffices: 1 where merging is off or gains nothing.
int MostMicrobatchesPerPass(const v1::JobSpec& spec, const model::ModelConfig& config, int pipeline_size, absl::string_view kind);

// The layout for one pipeline size on devices of `kind` (cpu | cuda). activation_checkpointing: auto counts as none here. microbatches_per_pass: from 1 to the
// micro-batches of a step and replica. INVALID_ARGUMENT when that size is impossible (see CheckLayout).
absl::StatusOr<Layout> MakeLayout(const v1::JobSpec& spec, const model::ModelConfig& config, int pipeline_size, absl::string_view kind, const PlanFacts& facts,
                                  int microbatches_per_pass = 1);

}  // namespace ppft::coordinator
