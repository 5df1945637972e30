#include "worker/trainer/checkpoint/adapter_file.h"

#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {

std::vector<NamedTensor> AdapterTensorsOf(const std::vector<StageModel*>& stages) {
  std::vector<NamedTensor> tensors;
  for (StageModel* stage : stages) {
    for (const Parameter& parameter : stage->parameters()) tensors.push_back({parameter.name, parameter.master});
  }
  std::sort(tensors.begin(), tensors.end(), [](const NamedTensor& a, const NamedTensor& b) { return a.name < b.name; });
  return tensors;
}

absl::StatusOr<WrittenFile> WriteAdapterFile(const std::string& path, const std::vector<StageModel*>& stages) {
  return WriteTensorFile(path, AdapterTensorsOf(stages), {{"format", "pt"}});
}

absl::Status LoadAdapter(const TensorFile& adapter, StageModel& stage) {
  return CatchTorch("adapter", [&]() -> absl::Status {
    std::vector<at::Tensor> values;
    for (const Parameter& parameter : stage.parameters()) {
      PPFT_ASSIGN_OR_RETURN(const at::Tensor value, adapter.Read(parameter.name));
      if (value.sizes() != parameter.master.sizes()) {
        return absl::InvalidArgumentError(absl::StrCat("adapter tensor ", parameter.name, " has the shape ", model::ShapeText(value.sizes().vec()),
                                                       ", but this job needs ", model::ShapeText(parameter.master.sizes().vec())));
      }
      if (!at::isfinite(value).all().item<bool>()) {
        return absl::InvalidArgumentError(absl::StrCat("adapter tensor ", parameter.name, " holds numbers that are not finite"));
      }
      values.push_back(value);
    }
    for (size_t i = 0; i < values.size(); ++i) stage.parameters()[i].master.copy_(values[i]);
    stage.AdapterChanged();
    return absl::OkStatus();
  });
}

}  // namespace ppft::trainer
