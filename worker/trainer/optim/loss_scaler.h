// The loss scale of fp16 runs, by DeepSpeed's rule (DynamicLossScaler): an overflow skips the step and, once the hysteresis is used up, halves the scale;
// a window of good steps doubles it. PURE. A static scale never moves, and an overflow still skips the step.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ppft::trainer {

struct LossScalerOptions {
  bool active = false;    // fp16 only; otherwise the scale is 1
  double loss_scale = 0;  // 0 = dynamic
  int initial_scale_power = 16;
  int window = 1000;
  int hysteresis = 2;
  double min_scale = 1;
  bool consecutive_hysteresis = false;
};

class LossScaler {
 public:
  explicit LossScaler(const LossScalerOptions& options) : options_(options), hysteresis_left_(std::max(1, options.hysteresis)) {
    if (options.active) scale_ = dynamic() ? static_cast<double>(uint64_t{1} << std::min(options.initial_scale_power, 62)) : options.loss_scale;
  }

  // After each step, with the same answer on all ranks.
  void Update(bool overflow) {
    if (!options_.active || !dynamic()) return;
    if (overflow) {
      if (hysteresis_left_ <= 1) {
        scale_ = std::max(scale_ / 2, options_.min_scale);
      } else {
        --hysteresis_left_;
      }
      good_steps_ = 0;
      return;
    }
    if (options_.consecutive_hysteresis) hysteresis_left_ = std::max(1, options_.hysteresis);
    if (++good_steps_ == options_.window) {
      if (!options_.consecutive_hysteresis) hysteresis_left_ = std::max(1, options_.hysteresis);
      scale_ *= 2;
      good_steps_ = 0;
    }
  }

  void Restore(double scale, int good_steps, int hysteresis_left) {
    if (!options_.active || !dynamic()) return;
    scale_ = scale;
    good_steps_ = good_steps;
    hysteresis_left_ = hysteresis_left;
  }

  bool active() const { return options_.active; }
  // The next overflow could lower the scale no further: DeepSpeed ends the run with it.
  bool exhausted() const { return dynamic() && hysteresis_left_ <= 1 && scale_ <= options_.min_scale; }
  double scale() const { return scale_; }
  int good_steps() const { return good_steps_; }
  int hysteresis_left() const { return hysteresis_left_; }

 private:
  bool dynamic() const { return options_.loss_scale == 0; }

  const LossScalerOptions options_;
  double scale_ = 1;
  int good_steps_ = 0;
  int hysteresis_left_;
};

}  // namespace ppft::trainer
