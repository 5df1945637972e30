#include "worker/trainer/optim/loss_scaler.h"

#include <gtest/gtest.h>

#include <cmath>
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
