#include "worker/trainer/engine/adapter_state.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/optim/adamw.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {

void AdapterState::ZeroGradients() {
  for (StageModel* stage : stages_) stage->ZeroGradients();
}

std::vector<Parameter> AdapterState::parameters() const {
  std::vector<Parameter> all;
  for (StageModel* stage : stages_) {
    for (const Parameter& parameter : stage->parameters()) all.push_back(parameter);
  }
  return all;
}

absl::StatusOr<std::vector<float>> AdapterState::ReadAll(const TensorSource& source, const std::string& prefix) const {
  std::vector<float> values;
  for (const Parameter& parameter : parameters()) {
    const std::string name = absl::StrCat(prefix, parameter.name);
    PPFT_ASSIGN_OR_RETURN(const at::Tensor read, source(name));
    if (read.sizes() != parameter.master.sizes()) return absl::InvalidArgumentError(absl::StrCat(name, " has another shape than this job's adapter"));
    const at::Tensor tensor = read.to(at::kFloat).contiguous();
    const float* data = tensor.data_ptr<float>();
    if (!std::isfinite(SumOfSquares(data, tensor.numel()))) return absl::DataLossError(absl::StrCat(name, " holds a number that is not finite"));
    values.insert(values.end(), data, data + tensor.numel());
  }
  return values;
}

absl::Status AdapterState::LoadMasters(const TensorSource& source) {
  return CatchTorch("adapter", [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> values, ReadAll(source, ""));
    SetMasters(values);
    return absl::OkStatus();
  });
}

absl::Status AdapterState::Restore(const TensorSource& source) {
  return CatchTorch("checkpoint", [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> masters, ReadAll(source, ""));
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> exp_avg, ReadAll(source, "exp_avg."));
    PPFT_ASSIGN_OR_RETURN(const std::vector<float> exp_avg_sq, ReadAll(source, "exp_avg_sq."));
    SetMoments(exp_avg, exp_avg_sq);
    SetMasters(masters);
    return absl::OkStatus();
  });
}

absl::Status AdapterState::LoadBestFrom(const TensorSource& source) {
  return CatchTorch("best checkpoint", [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(best_, ReadAll(source, ""));
    return absl::OkStatus();
  });
}

}  // namespace ppft::trainer
