// The base model with the adapter merged in, as Hugging Face safetensors: one shard per rank.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/trainer/checkpoint/tensor_file.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// Writes the base tensors of `stages`, merged (W + scale B A in fp32) and cast to `dtype`, one tensor in memory at a time. A tied embedding is written by the
// stage that embeds and by no other, so the shards of all ranks together hold each tensor once. INVALID_ARGUMENT
// for a dtype that the format does not know; else errors of the file system, and of `stages`, which read base tensors again.
// `progress` is called for each tensor, and after each part of one that the disk has taken.
absl::StatusOr<WrittenFile> WriteMergedFile(const std::string& path, const std::vector<StageModel*>& stages, at::ScalarType dtype,
                                            const std::function<void()>& progress);

}  // namespace ppft::trainer
