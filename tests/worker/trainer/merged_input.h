// Several micro-batches, one after the other, as the input of one pass.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>

#include <vector>

#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

inline MicrobatchInput MergedInput(const std::vector<MicrobatchInput>& inputs) {
  MicrobatchInput all = inputs[0];
  all.cu_seqlens = {0};
  std::vector<at::Tensor> ids, target_rows, target_ids;
  for (const MicrobatchInput& input : inputs) {
    const int32_t begin = all.cu_seqlens.back();
    for (size_t d = 1; d < input.cu_seqlens.size(); ++d) all.cu_seqlens.push_back(begin + input.cu_seqlens[d]);
    all.merged.push_back({input.microbatch, input.cu_seqlens.back()});
    ids.push_back(input.ids);
    target_rows.push_back(input.target_rows + begin);
    target_ids.push_back(input.target_ids);
  }
  all.ids = at::cat(ids);
  all.target_rows = at::cat(target_rows);
  all.target_ids = at::cat(target_ids);
  return all;
}

}  // namespace ppft::trainer
