#include "coordinator/core/planner/remedies.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace ppft::coordinator {
namespace {

constexpr size_t kMaxPairs = 3;
// A document cut to less than a quarter is another data set.
constexpr int kMostSequenceCut = 4;
constexpr int kLeastSequence = 8;
constexpr int kMaxMicrobatchValues = 256;
constexpr size_t kFewValues = 16;  // that are tried one by one

struct Change {
  std::string text;
  std::function<void(v1::JobSpec&)> apply;
};
// One setting: its other values, the nearest to the present one first. Each saves at least as much as the one before it.
using Setting = std::vector<Change>;

Setting Schedule(const RemedyInput& input) {
  if (input.layout.schedule != pipeline::ScheduleKind::kGPipe) return {};
  return {{"parallel.schedule: 1f1b", [](v1::JobSpec& spec) { spec.mutable_parallel()->set_schedule("1f1b"); }}};
}

Setting Checkpointing(const RemedyInput& input) {
  Setting setting;
  for (const char* word : {"selective", "full"}) {
    if (input.layout.checkpointing == word) setting.clear();  // only what comes after it saves more
    if (input.layout.checkpointing == word || input.layout.checkpointing == "full") continue;
    setting.push_back({absl::StrCat("parallel.activation_checkpointing: ", word),
                       [word](v1::JobSpec& spec) { spec.mutable_parallel()->set_activation_checkpointing(word); }});
  }
  return setting;
}

Setting Zero(const RemedyInput& input) {
  Setting setting;
  for (int stage = input.spec.parallel().zero_stage() + 1; stage <= 3 && input.layout.data_parallel_size > 1; ++stage) {
    setting.push_back({absl::StrCat("parallel.zero_stage: ", stage), [stage](v1::JobSpec& spec) { spec.mutable_parallel()->set_zero_stage(stage); }});
  }
  return setting;
}

Setting Microbatch(const RemedyInput& input) {
  Setting setting;
  const v1::TrainingSpec& training = input.spec.training();
  const int64_t global = training.has_global_batch_size() ? training.global_batch_size() : 0;
  const int step = std::max(1, training.micro_batch_size() / kMaxMicrobatchValues);
  for (int size = training.micro_batch_size() - 1; size >= 1; size -= size > step ? step : 1) {
    if (global % (int64_t{1} * size * input.layout.data_parallel_size) != 0) continue;
    setting.push_back({absl::StrCat("training.micro_batch_size: ", size), [size](v1::JobSpec& spec) { spec.mutable_training()->set_micro_batch_size(size); }});
  }
  return setting;
}

Setting Pipeline(const RemedyInput& input) {
  Setting setting;
  for (int size = input.layout.pipeline_size + 1; int64_t{1} * size * input.layout.virtual_stages <= input.config.num_layers; ++size) {
    const int needed = size * input.layout.data_parallel_size;
    const std::string note = needed > input.num_devices ? absl::StrCat(" (", needed, " devices; ", input.num_devices, " there)") : "";
    setting.push_back({absl::StrCat("parallel.pipeline_parallel_size: ", size, note), [size](v1::JobSpec& spec) {
                         spec.mutable_parallel()->set_pipeline_parallel_size(size);
                         spec.mutable_parallel()->clear_layers_per_stage();
                       }});
  }
  return setting;
}

Setting Sequence(const RemedyInput& input) {
  Setting setting;
  const int present = input.spec.data().sequence_len();
  for (int length = present / 2; length >= std::max(kLeastSequence, present / kMostSequenceCut); length /= 2) {
    setting.push_back({absl::StrCat("data.sequence_len: ", length), [length](v1::JobSpec& spec) { spec.mutable_data()->set_sequence_len(length); }});
  }
  return setting;
}

class Search {
 public:
  explicit Search(const RemedyInput& input) : input_(input) {
    for (const auto& make : {Schedule, Checkpointing, Zero, Microbatch, Pipeline, Sequence}) {
      Setting setting = make(input);
      std::erase_if(setting, [&](const Change& change) {
        v1::JobSpec spec = Present();
        change.apply(spec);
        return !CheckLayout(spec, input_.config).empty();
      });
      if (!setting.empty()) settings_.push_back(std::move(setting));
    }
    chosen_.resize(settings_.size());
  }

  std::vector<std::string> Find() {
    std::vector<std::string> found;
    for (size_t a = 0; a < settings_.size(); ++a) {
      if (Nearest(a)) found.push_back(Text());
      chosen_[a].reset();
    }
    for (size_t a = 0; found.empty() && a < settings_.size(); ++a) {
      for (size_t b = a + 1; b < settings_.size() && found.size() < kMaxPairs; ++b) {
        chosen_[a] = settings_[a].size() - 1;
        if (Nearest(b)) {
          Nearest(a);
          found.push_back(Text());
        }
        chosen_[a].reset();
        chosen_[b].reset();
      }
      if (!found.empty()) break;
    }
    if (found.empty() && Combination()) found.push_back(Text());
    return found;
  }

 private:
  using Choice = std::optional<size_t>;  // of a setting's changes

  v1::JobSpec Present() const {
    v1::JobSpec spec = input_.spec;
    spec.mutable_parallel()->set_pipeline_parallel_size(input_.layout.pipeline_size);
    return spec;
  }

  bool Fits() const {
    v1::JobSpec spec = Present();
    for (size_t i = 0; i < settings_.size(); ++i) {
      if (chosen_[i].has_value()) settings_[i][*chosen_[i]].apply(spec);
    }
    const absl::StatusOr<Layout> layout = MakeLayout(spec, input_.config, spec.parallel().pipeline_parallel_size(), input_.kind, input_.facts);
    return layout.ok() && layout->largest_rank_bytes() <= input_.limit_bytes;
  }

  // Sets the change of setting i that is nearest to the present value among those that fit beside what is chosen; false if none does.
  bool Nearest(size_t i) {
    const Choice before = chosen_[i];
    size_t low = 0, high = settings_[i].size();  // the first that fits lies in [low, high]
    while (high - low > kFewValues) {
      const size_t middle = (low + high) / 2;
      chosen_[i] = middle;
      (Fits() ? high : low) = middle;
    }
    for (high = std::min(high + 1, settings_[i].size()); low < high; ++low) {
      chosen_[i] = low;
      if (Fits()) return true;
    }
    chosen_[i] = before;
    return false;
  }

  // All settings at their most sparing value, then back, the dearest first, as far as it still fits.
  bool Combination() {
    for (size_t i = 0; i < settings_.size(); ++i) chosen_[i] = settings_[i].size() - 1;
    // Two of them may exclude each other.
    for (size_t i = settings_.size(); !Fits(); --i) {
      if (i == 0) return false;
      const Choice before = chosen_[i - 1];
      chosen_[i - 1].reset();
      if (Fits()) break;
      chosen_[i - 1] = before;
    }
    for (size_t i = settings_.size(); i-- > 0;) {
      if (!chosen_[i].has_value()) continue;
      const Choice before = chosen_[i];
      chosen_[i].reset();
      if (Fits()) continue;
      chosen_[i] = before;
      Nearest(i);
    }
    return true;
  }

  std::string Text() const {
    std::vector<std::string> parts;
    for (size_t i = 0; i < settings_.size(); ++i) {
      if (chosen_[i].has_value()) parts.push_back(settings_[i][*chosen_[i]].text);
    }
    return absl::StrJoin(parts, " with ");
  }

  const RemedyInput& input_;
  std::vector<Setting> settings_;
  std::vector<Choice> chosen_;
};

}  // namespace

std::vector<std::string> NearestRemedies(const RemedyInput& input) { return Search(input).Find(); }

}  // namespace ppft::coordinator
