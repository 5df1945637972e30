#include "coordinator/job_planner.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/config.h"
#include "coordinator/core/steps.h"

namespace ppft::coordinator {
namespace {

constexpr size_t kMaxRefusals = 256;
constexpr double kCudnnCapability = 9.0;

// Of GPUs, those whose attention is not cuDNN's.
bool NeedsFlash(const v1::Device& device) {
  double capability = 0;
  return device.kind() == "cuda" && (device.deterministic() || (absl::SimpleAtod(device.compute_capability(), &capability) && capability < kCudnnCapability));
}

// Rows that a micro-batch of so many tokens holds at most: the shortest ones.
int64_t MostDocuments(const v1::TokenStatistics& rows, int64_t tokens) {
  std::vector<int64_t> lengths(rows.lengths().begin(), rows.lengths().end());
  std::sort(lengths.begin(), lengths.end());
  int64_t documents = 0;
  for (const int64_t length : lengths) {
    tokens -= std::max<int64_t>(1, length);
    if (tokens < 0) break;
    ++documents;
  }
  return documents;
}

// Everything that the answer depends on.
std::string KeyOf(const PlanRequest& request, const std::string& model) {
  std::string key =
      absl::StrCat(model, "\n", request.kind, " ", request.total_steps, " ", request.supervised_ratio, " ", request.longest_row, " ", request.documents);
  for (const PlanDevice& device : request.devices)
    absl::StrAppend(&key, "\n", device.worker, " ", device.id, " ", device.kind, " ", device.memory_bytes, " ", device.deterministic, " ", device.flash);
  return absl::StrCat(key, "\n", request.spec.SerializeAsString());
}

}  // namespace

absl::StatusOr<int64_t> JobPlanner::TotalSteps(const v1::JobRecord& record) {
  const v1::JobSpec& spec = record.job().spec();
  if (!record.has_prepared() && !spec.training().has_max_steps()) return 0;
  if (const auto it = total_steps_.find(record.job().id()); it != total_steps_.end()) return it->second;
  PPFT_ASSIGN_OR_RETURN(const int64_t total, coordinator::TotalSteps(spec, record.prepared().train()));
  return total_steps_[record.job().id()] = total;
}

int64_t JobPlanner::Documents(const v1::JobRecord& record, int64_t tokens) {
  if (!record.has_prepared()) return 0;
  if (const auto it = documents_.find(record.job().id()); it != documents_.end()) return it->second;
  return documents_[record.job().id()] = MostDocuments(record.prepared().train(), tokens);
}

absl::StatusOr<PlanRequest> JobPlanner::RequestFor(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices,
                                                   const std::string& kind) {
  PlanRequest request;
  request.kind = kind;
  request.spec = record.job().spec();
  PPFT_ASSIGN_OR_RETURN(request.config, model::ParseModelConfig(model.config(), absl::StrCat(model.model().name(), "/config.json")));
  PPFT_ASSIGN_OR_RETURN(request.total_steps, TotalSteps(record));
  const v1::TokenStatistics& train = record.prepared().train();
  if (train.tokens() > 0 && train.supervised_tokens() > 0) {
    request.supervised_ratio = std::min(1.0, static_cast<double>(train.supervised_tokens()) / static_cast<double>(train.tokens()));
  }
  request.longest_row = std::max(train.longest_row(), record.prepared().eval().longest_row());
  for (const OfferedDevice& offered : devices) {
    request.devices.push_back(PlanDevice{offered.worker, offered.device.id(), offered.device.kind(), offered.device.memory_bytes(),
                                         std::max(1, offered.device.threads()), offered.device.deterministic(), NeedsFlash(offered.device)});
  }
  if (std::any_of(request.devices.begin(), request.devices.end(), [](const PlanDevice& device) { return device.kind == "cuda"; })) {
    request.documents = Documents(record, request.spec.training().micro_batch_size() * SequenceLength(request.spec, request.config));
  }
  return request;
}

absl::StatusOr<PlanDraft> JobPlanner::Draft(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices,
                                            bool gpus_away, double supervised_ratio) {
  PPFT_ASSIGN_OR_RETURN(PlanRequest request, RequestFor(record, model, devices, KindFor(record, devices, gpus_away)));
  if (supervised_ratio > 0 && supervised_ratio < 1) request.supervised_ratio = supervised_ratio;
  return DraftPlan(request);
}

PlanAttempt JobPlanner::Plan(const v1::JobRecord& record, const v1::ModelRecord& model, const std::vector<OfferedDevice>& devices, const std::string& kind) {
  PlanAttempt attempt;
  const absl::StatusOr<PlanRequest> request = RequestFor(record, model, devices, kind);
  if (!request.ok()) {
    attempt.message = std::string(request.status().message());
    return attempt;
  }
  const std::string key = KeyOf(*request, model.model().name());
  if (const auto known = refusals_.find(key); known != refusals_.end()) return known->second;
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
    if (refusals_.size() >= kMaxRefusals) refusals_.clear();
    refusals_[key] = attempt;
  }
  return attempt;
}

}  // namespace ppft::coordinator
