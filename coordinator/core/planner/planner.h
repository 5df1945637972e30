// The planner: from what the user asks for, a model and devices to a Plan that every rank executes as it stands. PURE: the same request gives the
// same plan, byte for byte.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/config.h"
#include "coordinator/core/planner/layout.h"
#include "coordinator/core/planner/placement.h"
#include "ppft/v1/plan.pb.h"
#include "ppft/v1/spec.pb.h"

namespace ppft::coordinator {

struct PlanRequest {
  v1::JobSpec spec;  // checked by spec::Check
  model::ModelConfig config;
  int64_t total_steps = 0;
  std::vector<PlanDevice> devices;  // usable ones, in any order: those that are free, or all of the cluster to see what could ever be
  double supervised_ratio = 1;      // supervised tokens / tokens of the prepared data, (0, 1]; 1 when not known: only those rows reach the head
  int64_t longest_row = 0;          // tokens of the prepared data's longest row; 0 when not known
  int64_t documents = 0;            // of a packed micro-batch, at most; 0 when not known
  std::string kind{};               // cpu | cuda: the devices to use, also when none of them is there; empty: cuda if one is there
};

// A plan that may still lack devices: what `ppctl plan` shows.
struct PlanDraft {
  v1::Plan plan;  // worker, device of the ranks and threads_per_rank are empty unless the devices are there
  int devices_needed = 0;
  int devices_present = 0;  // of the kind that the plan uses
  // OK; UNAVAILABLE: too few devices are there (NO_CAPACITY, the job waits); RESOURCE_EXHAUSTED: no device has the memory (OUT_OF_DEVICE_MEMORY); the
  // message is a sentence with the numbers and, for memory, the nearest settings that would fit.
  absl::Status fit;
};

// auto resolves to: pipeline_parallel_size the smallest whose ranks fit the devices' memory; data_parallel_size 1; schedule 1f1b (interleaved_1f1b with
// virtual stages, gpipe when there are fewer micro-batches than stages); activation_checkpointing the least that fits;
// compute fp32 on CPU, bf16 on CUDA. A job that CUDA devices cannot carry is not laid on CPU slots beside them: `fit` says what it lacks.
// INVALID_ARGUMENT: "field: what is wrong and what to do", a line per violation (CheckLayout gives them one by one).
absl::StatusOr<PlanDraft> DraftPlan(const PlanRequest& request);

// The plan to commit: a draft that fits and passed CheckPlan. Errors: those of DraftPlan and of PlanDraft::fit.
absl::StatusOr<v1::Plan> PlanJob(const PlanRequest& request);

// Is this plan whole and safe to execute: the mesh is complete, the stages cover `num_layers` layers once and in order, every rank has a device of its own,
// and the dry run of its programs ends under the strictest transport with the activations that the plan states. FAILED_PRECONDITION with the cause.
absl::Status CheckPlan(const v1::Plan& plan, int64_t num_layers);

}  // namespace ppft::coordinator
