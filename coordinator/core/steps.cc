#include "coordinator/core/steps.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/format.h"
#include "common/base/status.h"
#include "common/data/batch_plan.h"

namespace ppft::coordinator {

absl::StatusOr<int64_t> TotalSteps(const v1::JobSpec& spec, const v1::TokenStatistics& train) {
  const v1::TrainingSpec& training = spec.training();
  if (training.has_max_steps()) return training.max_steps();
  data::SamplerOptions options;
  options.seed = static_cast<uint64_t>(spec.seed());
  options.shuffle = spec.data().shuffle();
  options.sample_packing = spec.data().sample_packing();
  options.sequence_len = spec.data().sequence_len();
  options.micro_batch_size = training.micro_batch_size();
  options.data_parallel_size = std::max(1, spec.parallel().data_parallel_size());
  options.num_microbatches = training.has_global_batch_size() ? training.global_batch_size() / (training.micro_batch_size() * options.data_parallel_size)
                                                              : training.gradient_accumulation_steps();
  data::RowSizes sizes;
  sizes.tokens.assign(train.lengths().begin(), train.lengths().end());
  sizes.targets.assign(train.targets().begin(), train.targets().end());
  PPFT_ASSIGN_OR_RETURN(data::Sampler sampler, data::Sampler::Create(std::move(sizes), options));
  const int64_t total = sampler.TotalSteps(training.num_epochs(), 0);
  if (training.has_warmup_steps() && training.warmup_steps() > total) {
    return absl::InvalidArgumentError(absl::StrCat("training.warmup_steps (", training.warmup_steps(), ") is more than the ", Counted(total, "step"),
                                                   " that training.num_epochs (", training.num_epochs(), ") takes over ", Counted(train.rows(), "row"),
                                                   ": lower warmup_steps or train longer"));
  }
  return total;
}

}  // namespace ppft::coordinator
