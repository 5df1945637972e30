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

// Sets every master of the stage from `adapter` (F32, BF16 or F16; tensors of other stages in it are ignored) and refreshes the compute copies.
// INVALID_ARGUMENT names the tensor that is missing, has another shape, or holds a number that is not finite; the stage is then unchanged.
absl::Status LoadAdapter(const TensorFile& adapter, StageModel& stage);

}  // namespace ppft::trainer
