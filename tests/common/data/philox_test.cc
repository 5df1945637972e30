#include "common/data/philox.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

namespace ppft::data {
namespace {

// Random123's kat_vectors for philox4x32-10.
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}), (PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxTest, StreamsOfOneSeedDiffer) {
  PhiloxStream a(7, PhiloxDomain::kShuffle, 0);
  PhiloxStream b(7, PhiloxDomain::kShuffle, 1);
  PhiloxStream c(7, PhiloxDomain::kHeldOut, 0);
  PhiloxStream d(uint64_t{7} << 32, PhiloxDomain::kShuffle, 0);
  const uint64_t first = a.Next64();
  EXPECT_NE(first, b.Next64());
  EXPECT_NE(first, c.Next64());
  EXPECT_NE(first, d.Next64());
}

TEST(PhiloxTest, BelowCoversItsRangeEvenly) {
  PhiloxStream random(1, PhiloxDomain::kShuffle, 0);
  std::vector<int> counts(5);
  for (int i = 0; i < 50'000; ++i) ++counts[random.Below(5)];
  for (const int count : counts) EXPECT_NEAR(count, 10'000, 500);
}

TEST(PhiloxTest, ShuffleReachesEveryOrderAboutEquallyOften) {
  std::map<std::vector<int>, int> seen;
  PhiloxStream random(3, PhiloxDomain::kShuffle, 0);
  for (int i = 0; i < 6'000; ++i) {
    std::vector<int> items = {1, 2, 3};
    Shuffle(random, items);
    ++seen[items];
  }
  ASSERT_EQ(seen.size(), 6u);
  for (const auto& [order, count] : seen) EXPECT_NEAR(count, 1'000, 150);
}

}  // namespace
}  // namespace ppft::data
