#include "worker/trainer/optim/loss_scaler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {
namespace {

LossScalerOptions Dynamic(int power, int window, int hysteresis) {
  LossScalerOptions options;
  options.active = true;
  options.initial_scale_power = power;
  options.window = window;
  options.hysteresis = hysteresis;
  return options;
}

TEST(LossScaler, HalvesOnceTheHysteresisIsUsedUpAndDoublesAfterAWindow) {
  LossScaler scaler(Dynamic(4, 3, 2));
  EXPECT_EQ(scaler.scale(), 16);
  scaler.Update(true);
  EXPECT_EQ(scaler.scale(), 16) << "the first overflow is forgiven";
  scaler.Update(true);
  EXPECT_EQ(scaler.scale(), 8);
  for (int i = 0; i < 2; ++i) scaler.Update(false);
  EXPECT_EQ(scaler.scale(), 8);
  scaler.Update(false);
  EXPECT_EQ(scaler.scale(), 16);
  scaler.Update(true);
  EXPECT_EQ(scaler.scale(), 16) << "the window has restored the hysteresis";
}

TEST(LossScaler, NeverBelowTheMinimum) {
  LossScaler scaler(Dynamic(2, 1000, 1));
  for (int i = 0; i < 10; ++i) scaler.Update(true);
  EXPECT_EQ(scaler.scale(), 1);
}

TEST(LossScaler, AStaticScaleStaysAndAnInactiveOneIsOne) {
  LossScalerOptions options = Dynamic(4, 1, 1);
  options.loss_scale = 1024;
  LossScaler fixed(options);
  fixed.Update(true);
  fixed.Update(false);
  EXPECT_EQ(fixed.scale(), 1024);
  options.active = false;
  EXPECT_EQ(LossScaler(options).scale(), 1);
}

TEST(LossScaler, GoesOnWhereItWasRestored) {
  LossScaler one(Dynamic(6, 5, 2)), two(Dynamic(6, 5, 2));
  const std::vector<bool> overflows = {true, false, false, true, true, false, false, false, false, false, true};
  for (size_t i = 0; i < overflows.size(); ++i) {
    one.Update(overflows[i]);
    LossScaler next(Dynamic(6, 5, 2));
    next.Restore(two.scale(), two.good_steps(), two.hysteresis_left());
    next.Update(overflows[i]);
    EXPECT_EQ(next.scale(), one.scale()) << "step " << i;
    two.Restore(next.scale(), next.good_steps(), next.hysteresis_left());
  }
}

// DeepSpeed's DynamicLossScaler.update_scale (deepspeed/runtime/fp16/loss_scaler.py), restated line by line.
struct DeepSpeedScaler {
  double cur_scale;
  double min_scale;
  int scale_window;
  int delayed_shift;
  bool consecutive_hysteresis;
  int64_t cur_iter = 0;
  int64_t last_overflow_iter = -1;
  int cur_hysteresis = delayed_shift;
  bool raised = false;

  void UpdateScale(bool overflow) {
    if (overflow) {
      if (delayed_shift == 1 || cur_hysteresis == 1) {
        if (cur_scale == min_scale) {
          raised = true;
          return;
        }
        cur_scale = std::max(cur_scale / 2.0, min_scale);
      } else {
        cur_hysteresis -= 1;
      }
      last_overflow_iter = cur_iter;
    } else {
      if (consecutive_hysteresis) cur_hysteresis = delayed_shift;
      if ((cur_iter - last_overflow_iter) % scale_window == 0) {
        if (!consecutive_hysteresis) cur_hysteresis = delayed_shift;
        cur_scale *= 2.0;
      }
    }
    cur_iter += 1;
  }
};

// Each step of a long run with overflows at chosen steps: alone, in rows, at the edges of the window, down to the minimum.
TEST(LossScaler, FollowsDeepSpeedStepByStep) {
  struct Overflows {
    const char* name;
    std::function<bool(int)> at;
  };
  const Overflows patterns[] = {
      {"never", [](int) { return false; }},
      {"the first four", [](int i) { return i < 4; }},
      {"alone", [](int i) { return i % 17 == 5; }},
      {"in pairs", [](int i) { return i % 23 < 2; }},
      {"at the window's end", [](int i) { return i % 5 == 4; }},
      {"after the window", [](int i) { return i % 6 == 5; }},
      {"every other", [](int i) { return i % 2 == 1; }},
      {"a long row", [](int i) { return i >= 40 && i < 60; }},
      {"scattered", [](int i) { return (i * 2654435761u >> 24) % 7 == 0; }},
  };
  int raised = 0;
  for (const Overflows& pattern : patterns) {
    for (const int window : {1, 2, 5, 1000}) {
      for (const int hysteresis : {1, 2, 3}) {
        for (const bool consecutive : {false, true}) {
          for (const double min_scale : {1.0, 64.0}) {
            LossScalerOptions options = Dynamic(16, window, hysteresis);
            options.consecutive_hysteresis = consecutive;
            options.min_scale = min_scale;
            LossScaler ours(options);
            DeepSpeedScaler theirs{65536.0, min_scale, window, hysteresis, consecutive};
            for (int i = 0; i < 200; ++i) {
              const bool ends = pattern.at(i) && ours.exhausted();
              theirs.UpdateScale(pattern.at(i));
              ASSERT_EQ(ends, theirs.raised) << pattern.name << ", step " << i << ", window " << window << ", hysteresis " << hysteresis;
              if (ends) {
                ++raised;
                break;
              }
              ours.Update(pattern.at(i));
              ASSERT_EQ(ours.scale(), theirs.cur_scale)
                  << pattern.name << ", step " << i << ", window " << window << ", hysteresis " << hysteresis << ", consecutive " << consecutive;
              ASSERT_EQ(ours.hysteresis_left(), theirs.cur_hysteresis);
            }
          }
        }
      }
    }
  }
  EXPECT_GT(raised, 0) << "some pattern has to reach the minimum";
}

TEST(SumOfSquares, IsNotFiniteExactlyWhenAValueIsNot) {
  std::vector<float> values(1003, 1e30f);
  EXPECT_NEAR(SumOfSquares(values.data(), 1003) / (1003e60), 1.0, 1e-6);
  values[1001] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(std::isfinite(SumOfSquares(values.data(), 1003)));
  EXPECT_TRUE(std::isfinite(SumOfSquares(values.data(), 1001)));
  values[1001] = -std::numeric_limits<float>::infinity();
  EXPECT_FALSE(std::isfinite(SumOfSquares(values.data(), 1003)));
}

TEST(ClipFactor, AsTorch) {
  EXPECT_EQ(ClipFactor(0.5, 1.0), 1.0);
  EXPECT_DOUBLE_EQ(ClipFactor(4.0, 1.0), 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(ClipFactor(4.0, 0.0), 1.0) << "0 means no clipping";
}

}  // namespace
}  // namespace ppft::trainer
