#include "common/pipeline/action.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace ppft::pipeline {
namespace {

using ::testing::HasSubstr;

TEST(ActionTest, TextOfEveryOperation) {
  EXPECT_EQ(ToString({2, Op::kForward, 0}), "2F0");
  EXPECT_EQ(ToString({2, Op::kBackward, 10}), "2B10");
  EXPECT_EQ(ToString({2, Op::kSendForward, 0}), "2SEND_F0");
  EXPECT_EQ(ToString({2, Op::kRecvForward, 0}), "2RECV_F0");
  EXPECT_EQ(ToString({2, Op::kSendBackward, 0}), "2SEND_B0");
  EXPECT_EQ(ToString({12, Op::kRecvBackward, 3}), "12RECV_B3");
}

TEST(ActionTest, ParsesWhatItPrints) {
  for (Op op : {Op::kForward, Op::kBackward, Op::kSendForward, Op::kRecvForward, Op::kSendBackward, Op::kRecvBackward}) {
    const Action action{17, op, 23};
    absl::StatusOr<Action> parsed = ParseAction(ToString(action));
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(*parsed, action);
  }
}

TEST(ActionTest, RefusesWhatIsNoAction) {
  for (const char* text :
       {"", "F", "2F", "F0", "2X0", "2f0", "-2F0", "2F-1", "2F+1", "2SEND0", "2SEND_F", "2F0x", "2 F0", "99999999999F0", "2F99999999999", "2FF0"}) {
    absl::StatusOr<Action> parsed = ParseAction(text);
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(text));
  }
}

TEST(ProgramTest, RoundTripAndPositionOfTheFirstBadAction) {
  absl::StatusOr<Program> program = ParseProgram("  0F0\n0SEND_F0\t0RECV_B0 0B0 ");
  ASSERT_TRUE(program.ok()) << program.status();
  EXPECT_EQ(FormatProgram(*program), "0F0 0SEND_F0 0RECV_B0 0B0");
  EXPECT_TRUE(ParseProgram("")->empty());
  EXPECT_THAT(std::string(ParseProgram("0F0 0F1 1G2").status().message()), HasSubstr("action 2"));
}

TEST(ProgramTest, SendsAndReceivesMatch) {
  EXPECT_EQ(MatchingReceive({1, Op::kSendForward, 4}), (Action{2, Op::kRecvForward, 4}));
  EXPECT_EQ(MatchingReceive({1, Op::kSendBackward, 4}), (Action{0, Op::kRecvBackward, 4}));
  EXPECT_EQ(MatchingSend({2, Op::kRecvForward, 4}), (Action{1, Op::kSendForward, 4}));
  EXPECT_EQ(MatchingSend({0, Op::kRecvBackward, 4}), (Action{1, Op::kSendBackward, 4}));
}

}  // namespace
}  // namespace ppft::pipeline
