#include "worker/trainer/optim/schedule.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace ppft::trainer {
namespace {

double AtLeastOne(int64_t steps) { return static_cast<double>(std::max<int64_t>(1, steps)); }

double Cosine(double progress) { return 0.5 * (1.0 + std::cos(M_PI * progress)); }

double Wsd(const LearningRateSchedule& s, int64_t at) {
  const double floor = s.min_lr_ratio;
  if (at < s.warmup_steps) return std::max(0.0, static_cast<double>(at) / AtLeastOne(s.warmup_steps) * (1.0 - floor) + floor);
  const int64_t decay_begin = std::max(s.warmup_steps, s.total_steps - s.decay_steps);
  if (at < decay_begin) return 1.0;
  if (at >= decay_begin + s.decay_steps) return floor;
  return std::max(0.0, Cosine(static_cast<double>(at - decay_begin) / AtLeastOne(s.decay_steps)) * (1.0 - floor) + floor);
}

}  // namespace

absl::Status CheckSchedule(const LearningRateSchedule& schedule) {
  for (const char* name : {"constant", "linear", "cosine", "cosine_with_min_lr", "wsd"}) {
    if (schedule.name == name) return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("lr_scheduler \"", schedule.name, "\" is unknown: use constant, linear, cosine, cosine_with_min_lr or wsd"));
}

double LearningRateFactor(const LearningRateSchedule& s, int64_t step) {
  const int64_t at = step - 1;
  if (s.name == "wsd") return Wsd(s, at);
  if (at < s.warmup_steps) return static_cast<double>(at) / AtLeastOne(s.warmup_steps);
  if (s.name == "constant") return 1.0;
  const double rest = AtLeastOne(s.total_steps - s.warmup_steps);
  if (s.name == "linear") return std::max(0.0, static_cast<double>(s.total_steps - at) / rest);
  const double cosine = Cosine(static_cast<double>(at - s.warmup_steps) / rest);
  if (s.name == "cosine_with_min_lr") return std::max(0.0, cosine * (1.0 - s.min_lr_ratio) + s.min_lr_ratio);
  return std::max(0.0, cosine);
}

double LearningRate(const LearningRateSchedule& schedule, int64_t step) { return schedule.learning_rate * LearningRateFactor(schedule, step); }

int64_t StepsOfRatio(double ratio, int64_t total_steps) { return static_cast<int64_t>(std::ceil(ratio * static_cast<double>(total_steps))); }

}  // namespace ppft::trainer
