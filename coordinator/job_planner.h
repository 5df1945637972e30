// The planner as the controller calls it: spec, prepared data and model of a job become a request, its answer a PlanAttempt.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/core/planner/planner.h"
#include "coordinator/core/queue.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// Pure but for caches: step counts and documents, which cost a pass over all rows, and refusals, which cost a search for settings that would fit and are asked
// for again whenever anything happens in the cluster. One thread.
class JobPlanner {
 public:
  // On `devices` of `kind` (cuda | cpu).
  PlanAttempt Plan(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices, const std::string& kind);
  // What PlanJob shows: on all devices of the cluster, those of the kind that the queue would take (KindFor). Also for a job whose data is not prepared.
  // supervised_ratio: see PlanJobRequest.
  absl::StatusOr<PlanDraft> Draft(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices, bool gpus_away,
                                  double supervised_ratio);

 private:
  absl::StatusOr<PlanRequest> RequestFor(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices,
                                         const std::string& kind);
  absl::StatusOr<int64_t> TotalSteps(const v1::JobRecord& record);
  // Of a packed micro-batch of `tokens`, at most; 0 before the data is prepared.
  int64_t Documents(const v1::JobRecord& record, int64_t tokens);

  std::map<std::string, int64_t> total_steps_;   // job -> steps
  std::map<std::string, int64_t> documents_;     // job -> documents
  std::map<std::string, PlanAttempt> refusals_;  // request -> answer
};

}  // namespace ppft::coordinator
