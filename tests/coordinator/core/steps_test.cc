#include "coordinator/core/steps.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace ppft::coordinator {
namespace {

TEST(TotalStepsTest, EpochsOverTheRowsAndAWarmUpThatFits) {
  v1::TokenStatistics train;
  train.set_rows(10);
  for (int row = 0; row < 10; ++row) {
    train.add_lengths(20);
    train.add_targets(5);
  }
  v1::JobSpec spec;
  spec.mutable_data()->set_sequence_len(64);
  spec.mutable_training()->set_micro_batch_size(2);
  spec.mutable_training()->set_gradient_accumulation_steps(2);
  spec.mutable_training()->set_num_epochs(2);
  EXPECT_EQ(*TotalSteps(spec, train), 6);  // 10 rows, 4 a step: 3 steps an epoch
  spec.mutable_training()->set_warmup_steps(7);
  const absl::Status refused = TotalSteps(spec, train).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), testing::AllOf(testing::HasSubstr("warmup_steps (7)"), testing::HasSubstr("6 steps")));
  spec.mutable_training()->set_max_steps(100);
  EXPECT_EQ(*TotalSteps(spec, train), 100);
}

}  // namespace
}  // namespace ppft::coordinator
