// How many optimizer steps a job takes. Pure.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "ppft/v1/spec.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// max_steps, or what num_epochs passes over these rows take. INVALID_ARGUMENT names the field when the job cannot be run for that long.
absl::StatusOr<int64_t> TotalSteps(const v1::JobSpec& spec, const v1::TokenStatistics& train);

}  // namespace ppft::coordinator
