#include "common/data/batch_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/data/philox.h"

namespace ppft::data {
namespace {

absl::Status Check(const RowSizes& sizes, const SamplerOptions& options) {
  if (options.sequence_len < 1 || options.micro_batch_size < 1 || options.num_microbatches < 1 || options.data_parallel_size < 1) {
    return absl::InvalidArgumentError("sequence_len, micro_batch_size, gradient_accumulation_steps and data_parallel_size must be at least 1");
  }
  if (options.micro_batch_size > std::numeric_limits<int32_t>::max() / options.sequence_len) {
    return absl::InvalidArgumentError(absl::StrCat("micro_batch_size (", options.micro_batch_size, ") x sequence_len (", options.sequence_len,
                                                   ") must stay below 2^31 tokens: lower micro_batch_size"));
  }
  if (sizes.tokens.empty()) return absl::InvalidArgumentError("the dataset has no rows");
  if (sizes.tokens.size() != sizes.targets.size()) return absl::InvalidArgumentError("as many target counts as rows are needed");
  for (size_t row = 0; row < sizes.tokens.size(); ++row) {
    if (sizes.tokens[row] < 1 || sizes.tokens[row] > options.sequence_len) {
      return absl::InvalidArgumentError(
          absl::StrCat("row ", row, " of the token file has ", sizes.tokens[row], " tokens, expected 1 to sequence_len (", options.sequence_len, ")"));
    }
  }
  return absl::OkStatus();
}

void Add(Microbatch& microbatch, int64_t row, const RowSizes& sizes) {
  microbatch.rows.push_back(row);
  microbatch.tokens += sizes.tokens[row];
  microbatch.targets += sizes.targets[row];
}

std::vector<Microbatch> ByCount(const std::vector<int64_t>& order, const RowSizes& sizes, int64_t micro_batch_size) {
  std::vector<Microbatch> out;
  for (const int64_t row : order) {
    if (out.empty() || static_cast<int64_t>(out.back().rows.size()) == micro_batch_size) out.emplace_back();
    Add(out.back(), row, sizes);
  }
  return out;
}

// First fit over the newest `window` bins; the bins stay in the order in which they were opened.
std::vector<Microbatch> Packed(const std::vector<int64_t>& order, const RowSizes& sizes, int64_t capacity, int64_t window) {
  std::vector<Microbatch> bins;
  for (const int64_t row : order) {
    size_t bin = bins.size() > static_cast<size_t>(window) ? bins.size() - static_cast<size_t>(window) : 0;
    while (bin < bins.size() && bins[bin].tokens + sizes.tokens[row] > capacity) ++bin;
    if (bin == bins.size()) bins.emplace_back();
    Add(bins[bin], row, sizes);
  }
  return bins;
}

std::vector<Microbatch> Divide(const std::vector<int64_t>& order, const RowSizes& sizes, const SamplerOptions& options, int64_t window) {
  return options.sample_packing ? Packed(order, sizes, options.micro_batch_size * options.sequence_len, window)
                                : ByCount(order, sizes, options.micro_batch_size);
}

std::vector<int64_t> FileOrder(const RowSizes& sizes) {
  std::vector<int64_t> order(sizes.tokens.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  return order;
}

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

RowSizes SizesOf(const TokenRows& rows) {
  RowSizes sizes;
  sizes.tokens.reserve(rows.num_rows());
  sizes.targets.reserve(rows.num_rows());
  for (int64_t row = 0; row < rows.num_rows(); ++row) {
    sizes.tokens.push_back(static_cast<int32_t>(rows.length(row)));
    sizes.targets.push_back(static_cast<int32_t>(rows.targets(row)));
  }
  return sizes;
}

absl::StatusOr<Sampler> Sampler::Create(RowSizes sizes, const SamplerOptions& options) {
  PPFT_RETURN_IF_ERROR(Check(sizes, options));
  return Sampler(std::move(sizes), options);
}

void Sampler::LoadEpoch(int64_t epoch_index) {
  if (epoch_index == loaded_epoch_) return;
  if (loaded_epoch_ < 0 || options_.shuffle) {
    std::vector<int64_t> order = FileOrder(sizes_);
    if (options_.shuffle) {
      PhiloxStream random(options_.seed, PhiloxDomain::kShuffle, static_cast<uint32_t>(epoch_index));
      Shuffle(random, order);
    }
    epoch_microbatches_ = Divide(order, sizes_, options_, kPackingWindow);
  }
  loaded_epoch_ = epoch_index;
}

int64_t Sampler::FirstStep(int64_t epoch_index) {
  while (static_cast<int64_t>(steps_before_.size()) <= epoch_index) {
    // Only packing a shuffled order makes epochs of different lengths; everything else is known without laying out each epoch.
    if (!(options_.shuffle && options_.sample_packing) && steps_before_.size() > 1) {
      steps_before_.push_back(steps_before_.back() + steps_before_[1]);
      continue;
    }
    LoadEpoch(static_cast<int64_t>(steps_before_.size()) - 1);
    const int64_t microbatches = static_cast<int64_t>(epoch_microbatches_.size());
    steps_before_.push_back(steps_before_.back() + DivideUp(microbatches, options_.num_microbatches * options_.data_parallel_size));
  }
  return steps_before_[epoch_index];
}

int64_t Sampler::StepsPerEpoch(int64_t epoch_index) {
  const int64_t end = FirstStep(epoch_index + 1);
  return end - FirstStep(epoch_index);
}

int64_t Sampler::TotalSteps(double num_epochs, int64_t max_steps) {
  if (max_steps > 0) return max_steps;
  const int64_t whole = static_cast<int64_t>(std::floor(num_epochs));
  const double part = num_epochs - static_cast<double>(whole);
  int64_t steps = FirstStep(whole);
  if (part > 0) steps += static_cast<int64_t>(std::ceil(part * static_cast<double>(StepsPerEpoch(whole))));
  return std::max<int64_t>(steps, 1);
}

StepPlan Sampler::Step(int64_t step) {
  int64_t epoch_index = std::upper_bound(steps_before_.begin(), steps_before_.end(), step - 1) - steps_before_.begin() - 1;
  while (FirstStep(epoch_index + 1) < step) ++epoch_index;
  LoadEpoch(epoch_index);

  const int64_t replicas = options_.data_parallel_size;
  const int64_t per_step = options_.num_microbatches * replicas;
  const int64_t available = static_cast<int64_t>(epoch_microbatches_.size());
  const int64_t begin = (step - 1 - FirstStep(epoch_index)) * per_step;

  StepPlan plan;
  plan.step = step;
  plan.epoch_index = epoch_index;
  plan.epoch = static_cast<double>(epoch_index) + static_cast<double>(std::min(begin + per_step, available)) / static_cast<double>(available);
  plan.microbatches.assign(replicas, std::vector<Microbatch>(options_.num_microbatches));
  for (int64_t i = 0; i < per_step; ++i) {
    Microbatch& microbatch = plan.microbatches[i % replicas][i / replicas];
    if (begin + i < available) microbatch = epoch_microbatches_[begin + i];
    microbatch.index = i;
    plan.tokens += microbatch.tokens;
    plan.targets += microbatch.targets;
  }
  return plan;
}

absl::StatusOr<std::vector<Microbatch>> EvaluationPlan(const RowSizes& sizes, const SamplerOptions& options) {
  PPFT_RETURN_IF_ERROR(Check(sizes, options));
  std::vector<Microbatch> plan = Divide(FileOrder(sizes), sizes, options, /*window=*/1);
  for (size_t i = 0; i < plan.size(); ++i) plan[i].index = static_cast<int64_t>(i);
  return plan;
}

MicrobatchArrays Assemble(const TokenRows& rows, const Microbatch& microbatch) {
  MicrobatchArrays out;
  out.cu_seqlens.reserve(microbatch.rows.size() + 1);
  out.cu_seqlens.push_back(0);
  out.ids.reserve(microbatch.tokens);
  out.target_rows.reserve(microbatch.targets);
  out.target_ids.reserve(microbatch.targets);
  for (const int64_t row : microbatch.rows) {
    const int64_t begin = rows.offsets[row];
    const int64_t length = rows.length(row);
    const int64_t base = static_cast<int64_t>(out.ids.size());
    for (int64_t t = 0; t < length; ++t) {
      out.ids.push_back(rows.ids[begin + t]);
      if (t == 0 || rows.supervised[begin + t] == 0) continue;
      out.target_rows.push_back(base + t - 1);
      out.target_ids.push_back(rows.ids[begin + t]);
    }
    out.cu_seqlens.push_back(static_cast<int32_t>(out.ids.size()));
  }
  return out;
}

}  // namespace ppft::data
