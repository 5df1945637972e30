#include "common/base/format.h"

#include <gtest/gtest.h>

namespace ppft {
namespace {

TEST(FormatBytes, AreToldInPowersOf1024) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.0 KiB");
  EXPECT_EQ(FormatBytes(61248745), "58 MiB");
  EXPECT_EQ(FormatBytes(int64_t{3} << 19), "1.5 MiB");
  EXPECT_EQ(FormatBytes(int64_t{1404} << 30 >> 1), "702.0 GiB");
  EXPECT_EQ(FormatBytes(int64_t{3} << 40), "3.0 TiB");
}

TEST(Counted, OneIsInTheSingular) {
  EXPECT_EQ(Counted(1, "step"), "1 step");
  EXPECT_EQ(Counted(0, "step"), "0 steps");
  EXPECT_EQ(Counted(12, "evaluation row"), "12 evaluation rows");
}

}  // namespace
}  // namespace ppft
