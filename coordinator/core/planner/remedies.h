// What to change in a job so that it would fit. PURE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/model/config.h"
#include "coordinator/core/planner/layout.h"
#include "ppft/v1/spec.pb.h"

namespace ppft::coordinator {

struct RemedyInput {
  const v1::JobSpec& spec;  // activation_checkpointing resolved
  const model::ModelConfig& config;
  const PlanFacts& facts;
  const Layout& layout;  // of the spec: the one that does not fit
  absl::string_view kind;
  int64_t limit_bytes = 0;  // a rank may need so much
  int num_devices = 0;      // that have it
};

// The nearest settings with which every rank stays below the limit: each single setting that suffices, at the value nearest to the present one; where none
// does, pairs; where no pair does, the smallest combination. Only what MakeLayout accepts and finds to fit. Empty: nothing helps.
// "training.micro_batch_size: 4", "parallel.activation_checkpointing: full with parallel.pipeline_parallel_size: 2".
std::vector<std::string> NearestRemedies(const RemedyInput& input);

}  // namespace ppft::coordinator
