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

MicrobatchInput InputOf(const data::TokenRows& rows, absl::Span<const data::Microbatch> microbatches, const InputOptions& options) {
  MicrobatchInput input;
  input.step = options.step;
  input.microbatch = static_cast<int>(microbatches.front().index);
  input.loss_weight = options.loss_weight;
  input.training = options.training;
  data::Microbatch all;
  for (const data::Microbatch& microbatch : microbatches) {
    all.rows.insert(all.rows.end(), microbatch.rows.begin(), microbatch.rows.end());
    all.tokens += microbatch.tokens;
    all.targets += microbatch.targets;
    if (microbatches.size() > 1 && microbatch.tokens > 0) input.merged.push_back({static_cast<int>(microbatch.index), microbatch.tokens});
  }
  if (all.rows.empty()) return input;
  data::MicrobatchArrays arrays = data::Assemble(rows, all);
  input.cu_seqlens = std::move(arrays.cu_seqlens);
  input.ids = TensorOf(arrays.ids);
  input.target_rows = TensorOf(arrays.target_rows);
  input.target_ids = TensorOf(arrays.target_ids);
  return input;
}

std::vector<MicrobatchInput> InputsOf(const data::TokenRows& rows, absl::Span<const data::Microbatch> microbatches, int per_pass, const InputOptions& options) {
  std::vector<MicrobatchInput> inputs;
  for (size_t begin = 0; begin < microbatches.size(); begin += static_cast<size_t>(per_pass)) {
    inputs.push_back(InputOf(rows, microbatches.subspan(begin, static_cast<size_t>(per_pass)), options));
  }
  return inputs;
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
