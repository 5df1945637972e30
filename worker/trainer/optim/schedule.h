// Learning rate of each optimizer step: the formulas of transformers.optimization (get_*_schedule_with_warmup, get_wsd_schedule with its defaults: linear
// warm-up, cosine decay). PURE.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace ppft::trainer {

struct LearningRateSchedule {
  std::string name = "cosine";  // constant | linear | cosine | cosine_with_min_lr | wsd
  double learning_rate = 2e-4;  // the peak
  int64_t warmup_steps = 0;
  int64_t total_steps = 1;
  double min_lr_ratio = 0;  // cosine_with_min_lr, wsd: last rate / peak
  int64_t decay_steps = 0;  // wsd
};

// INVALID_ARGUMENT for a name that is none of the five.
absl::Status CheckSchedule(const LearningRateSchedule& schedule);

// What transformers' lambda gives for current_step = step - 1, so the first step (1) of a warm-up has factor 0.
double LearningRateFactor(const LearningRateSchedule& schedule, int64_t step);

// The rate used in optimizer step `step` (from 1).
double LearningRate(const LearningRateSchedule& schedule, int64_t step);

// As transformers counts them: the ratio of all steps, rounded up.
int64_t StepsOfRatio(double ratio, int64_t total_steps);

}  // namespace ppft::trainer
