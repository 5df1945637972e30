#include "worker/trainer/engine/batches.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::trainer {
namespace {

at::Tensor TensorOf(const std::vector<int64_t>& values) {
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), tensor.data_ptr<int64_t>());
  return tensor;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenData>> TokenData::Open(const std::string& path, int64_t vocab_size) {
  auto data = std::make_unique<TokenData>();
  PPFT_ASSIGN_OR_RETURN(data->mapping_, MappedFile::Open(path));
  absl::StatusOr<data::TokenFile> file = data::ParseTokenFile(data->mapping_.bytes());
  if (!file.ok()) return Annotate(file.status(), path);
  data->file_ = *std::move(file);
  for (const uint32_t id : data->rows().ids) {
    if (id >= static_cast<uint64_t>(vocab_size)) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": token ", id, " is not in the model's vocabulary of ", vocab_size));
    }
  }
  return data;
}

data::SamplerOptions SamplerOptionsOf(const TrainerConfig& config) {
  data::SamplerOptions options;
  options.seed = config.seed;
  options.shuffle = config.data.shuffle;
  options.sample_packing = config.data.sample_packing;
  options.sequence_len = config.data.sequence_len;
  options.micro_batch_size = config.data.micro_batch_size;
  options.num_microbatches = config.plan.num_microbatches;
  options.data_parallel_size = config.plan.data_parallel_size;
  return options;
}

MicrobatchInput InputOf(const data::TokenRows& rows, const data::Microbatch& microbatch, int64_t step, double loss_weight, bool training) {
  MicrobatchInput input;
  input.step = step;
  input.microbatch = static_cast<int>(microbatch.index);
  input.loss_weight = loss_weight;
  input.training = training;
  if (microbatch.rows.empty()) return input;
  data::MicrobatchArrays arrays = data::Assemble(rows, microbatch);
  input.cu_seqlens = std::move(arrays.cu_seqlens);
  input.ids = TensorOf(arrays.ids);
  input.target_rows = TensorOf(arrays.target_rows);
  input.target_ids = TensorOf(arrays.target_ids);
  return input;
}

MicrobatchInput ProbeInput(const std::vector<int32_t>& ids) {
  MicrobatchInput input;
  input.training = false;
  input.cu_seqlens = {0, static_cast<int32_t>(ids.size())};
  input.ids = TensorOf(std::vector<int64_t>(ids.begin(), ids.end()));
  input.target_rows = TensorOf({});
  input.target_ids = TensorOf({});
  return input;
}

}  // namespace ppft::trainer
