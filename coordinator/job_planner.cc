#include "coordinator/job_planner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/config.h"
#include "coordinator/core/steps.h"

namespace ppft::coordinator {

absl::StatusOr<int64_t> JobPlanner::TotalSteps(const v1::JobRecord& record) {
  const v1::JobSpec& spec = record.job().spec();
  if (!record.has_prepared() && !spec.training().has_max_steps()) return 0;
  if (const auto it = total_steps_.find(record.job().id()); it != total_steps_.end()) return it->second;
  PPFT_ASSIGN_OR_RETURN(const int64_t total, coordinator::TotalSteps(spec, record.prepared().train()));
  return total_steps_[record.job().id()] = total;
}

absl::StatusOr<PlanRequest> JobPlanner::RequestFor(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices) {
  PlanRequest request;
  request.spec = record.job().spec();
  PPFT_ASSIGN_OR_RETURN(request.config, model::ParseModelConfig(model.config(), absl::StrCat(model.model().name(), "/config.json")));
  PPFT_ASSIGN_OR_RETURN(request.total_steps, TotalSteps(record));
  const v1::TokenStatistics& train = record.prepared().train();
  if (train.tokens() > 0 && train.supervised_tokens() > 0) {
    request.supervised_ratio = std::min(1.0, static_cast<double>(train.supervised_tokens()) / static_cast<double>(train.tokens()));
  }
  for (const OfferedDevice& offered : devices) {
    request.devices.push_back(
        PlanDevice{offered.worker, offered.device.id(), offered.device.kind(), offered.device.memory_bytes(), std::max(1, offered.device.threads())});
  }
  return request;
}

absl::StatusOr<PlanDraft> JobPlanner::Draft(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices,
                                            double supervised_ratio) {
  PPFT_ASSIGN_OR_RETURN(PlanRequest request, RequestFor(record, model, devices));
  if (supervised_ratio > 0 && supervised_ratio < 1) request.supervised_ratio = supervised_ratio;
  return DraftPlan(request);
}

PlanAttempt JobPlanner::Plan(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices) {
  PlanAttempt attempt;
  const absl::StatusOr<PlanRequest> request = RequestFor(record, model, devices);
  if (!request.ok()) {
    attempt.message = std::string(request.status().message());
    return attempt;
  }
  absl::StatusOr<PlanDraft> draft = DraftPlan(*request);
  absl::Status status = draft.status();
  if (draft.ok()) {
    attempt.devices_needed = draft->devices_needed;
    status = draft->fit;
  }
  if (status.ok()) status = CheckPlan(draft->plan, request->config.num_layers);
  if (status.ok()) {
    attempt.plan = std::move(draft->plan);
  } else {
    attempt.message = std::string(status.message());
  }
  return attempt;
}

}  // namespace ppft::coordinator
