// The adapters of stages <-> safetensors with PEFT's keys, F32.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/trainer/checkpoint/tensor_file.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// The masters of all `stages` in one list, sorted by key as PEFT sorts them; views, not copies.
std::vector<NamedTensor> AdapterTensorsOf(const std::vector<StageModel*>& stages);

// Writes them as (a shard of) adapter_model.safetensors.
absl::StatusOr<WrittenFile> WriteAdapterFile(const std::string& path, const std::vector<StageModel*>& stages);

}  // namespace ppft::trainer
