#include "worker/trainer/engine/config.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::trainer {

absl::Status CheckConfig(const TrainerConfig& config) {
  const PlanSpec& plan = config.plan;
  const int ranks = plan.data_parallel_size * plan.pipeline_parallel_size;
  if (plan.data_parallel_size < 1 || plan.pipeline_parallel_size < 1 || plan.virtual_stages < 1 || plan.num_microbatches < 1) {
    return absl::InvalidArgumentError("the plan has a size below 1");
  }
  if (plan.microbatches_per_pass < 1 || plan.microbatches_per_pass > plan.num_microbatches) {
    return absl::InvalidArgumentError(absl::StrCat("the plan merges ", plan.microbatches_per_pass, " of ", plan.num_microbatches, " micro-batches"));
  }
  if (static_cast<int>(plan.ranks.size()) != ranks) {
    return absl::InvalidArgumentError(absl::StrCat("the plan lists ", plan.ranks.size(), " ranks where its mesh has ", ranks));
  }
  if (static_cast<int>(plan.stages.size()) != plan.pipeline_parallel_size * plan.virtual_stages) {
    return absl::InvalidArgumentError(
        absl::StrCat("the plan lists ", plan.stages.size(), " stages where it says ", plan.pipeline_parallel_size * plan.virtual_stages));
  }
  if (config.rank < 0 || config.rank >= ranks) return absl::InvalidArgumentError(absl::StrCat("rank ", config.rank, " is not in a plan of ", ranks));
  for (int rank = 0; rank < ranks; ++rank) {
    const RankSpec& spec = plan.ranks[static_cast<size_t>(rank)];
    if (spec.rank != rank || spec.pipeline_rank != rank % plan.pipeline_parallel_size || spec.replica != rank / plan.pipeline_parallel_size) {
      return absl::InvalidArgumentError(absl::StrCat("rank ", rank, " of the plan is not in its place"));
    }
    if (static_cast<int>(spec.stages.size()) != plan.virtual_stages) {
      return absl::InvalidArgumentError(absl::StrCat("rank ", rank, " holds ", spec.stages.size(), " stages where the plan says ", plan.virtual_stages));
    }
    for (int v = 0; v < plan.virtual_stages; ++v) {
      if (spec.stages[static_cast<size_t>(v)] != spec.pipeline_rank + v * plan.pipeline_parallel_size) {
        return absl::InvalidArgumentError(absl::StrCat("rank ", rank, " holds a stage that belongs to another rank"));
      }
    }
  }
  for (size_t i = 0; i < plan.stages.size(); ++i) {
    const StageSpec& stage = plan.stages[i];
    const int expected_first = i == 0 ? 0 : plan.stages[i - 1].first_layer + plan.stages[i - 1].num_layers;
    if (stage.stage != static_cast<int>(i) || stage.first_layer != expected_first || stage.num_layers < 1 || stage.has_embedding != (i == 0) ||
        stage.has_head != (i + 1 == plan.stages.size())) {
      return absl::InvalidArgumentError(absl::StrCat("stage ", i, " of the plan is not in its place"));
    }
  }
  if (plan.total_steps < 1) return absl::InvalidArgumentError("the plan has no optimizer step");
  if (plan.zero_stage < 0 || plan.zero_stage > 3) {
    return absl::InvalidArgumentError(absl::StrCat("parallel.zero_stage ", plan.zero_stage, " is unknown: use 0, 1, 2 or 3"));
  }
  if (config.logging_steps < 1) return absl::InvalidArgumentError("training.logging_steps must be at least 1");
  return CheckSchedule(config.schedule);
}

absl::Status CheckPasses(const pipeline::Program& program, const PlanSpec& plan) {
  std::set<int> passes;
  for (const pipeline::Action& action : program) {
    if (action.op == pipeline::Op::kForward) passes.insert(action.microbatch);
  }
  if (static_cast<int>(passes.size()) == plan.num_passes()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the plan's program takes ", passes.size(), " passes where its micro-batches make ", plan.num_passes()));
}

}  // namespace ppft::trainer
