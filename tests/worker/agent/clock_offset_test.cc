#include "worker/agent/clock_offset.h"

#include <gtest/gtest.h>

namespace ppft::agent {
namespace {

// The coordinator's clock is `offset` ahead; the ways there and back take as long as said, the answer 5.
void Exchange(ClockOffsetEstimate* estimate, int64_t sent, int64_t offset, int64_t there, int64_t back) {
  v1::ClockAnswer answer;
  answer.set_sent_unix_nanos(sent);
  answer.set_received_unix_nanos(sent + there + offset);
  answer.set_answered_unix_nanos(sent + there + offset + 5);
  estimate->Add(answer, sent + there + 5 + back);
}

TEST(ClockOffsetTest, EvenWaysGiveTheOffset) {
  ClockOffsetEstimate estimate;
  EXPECT_FALSE(estimate.known());
  Exchange(&estimate, 1000, -70000, 40, 40);
  ASSERT_TRUE(estimate.known());
  EXPECT_EQ(estimate.Get().offset_nanos(), -70000);
  EXPECT_EQ(estimate.Get().error_nanos(), 40);
}

TEST(ClockOffsetTest, TheQuickestAnswerCounts) {
  ClockOffsetEstimate estimate;
  Exchange(&estimate, 1000, 70000, 10, 9000);
  Exchange(&estimate, 2000, 70000, 30, 10);
  Exchange(&estimate, 3000, 70000, 4000, 10);
  EXPECT_EQ(estimate.Get().offset_nanos(), 70010);
  EXPECT_EQ(estimate.Get().error_nanos(), 20);
}

TEST(ClockOffsetTest, AnOffsetWithinTheErrorIsNone) {
  ClockOffsetEstimate estimate;
  Exchange(&estimate, 1000, 0, 10, 900);
  EXPECT_EQ(estimate.Get().offset_nanos(), 0);
  EXPECT_EQ(estimate.Get().error_nanos(), 455);
}

TEST(ClockOffsetTest, OldAnswersAreForgottenAndImpossibleOnesLeftOut) {
  ClockOffsetEstimate estimate;
  Exchange(&estimate, 1000, 70000, 1, 1);
  Exchange(&estimate, 2000, 70000, 1, -5000);  // this clock was set back in between
  EXPECT_EQ(estimate.Get().error_nanos(), 1);
  for (int i = 0; i < 16; ++i) Exchange(&estimate, 3000 + i, 90000, 50, 50);
  EXPECT_EQ(estimate.Get().offset_nanos(), 90000);
}

}  // namespace
}  // namespace ppft::agent
