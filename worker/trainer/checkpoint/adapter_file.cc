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

}  // namespace ppft::trainer
