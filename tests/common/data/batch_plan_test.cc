#include "common/data/batch_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/data/philox.h"

namespace ppft::data {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

RowSizes Sizes(std::vector<int32_t> tokens) {
  RowSizes sizes;
  for (const int32_t count : tokens) sizes.targets.push_back(count / 2);
  sizes.tokens = std::move(tokens);
  return sizes;
}

RowSizes RandomSizes(int rows, int longest, uint64_t seed) {
  PhiloxStream random(seed, PhiloxDomain::kShuffle, 99);
  std::vector<int32_t> tokens;
  for (int i = 0; i < rows; ++i) tokens.push_back(static_cast<int32_t>(random.Below(longest)) + 1);
  return Sizes(std::move(tokens));
}

SamplerOptions Plain(int64_t micro, int64_t accumulation, int64_t replicas = 1) {
  SamplerOptions options;
  options.shuffle = false;
  options.sample_packing = false;
  options.sequence_len = 64;
  options.micro_batch_size = micro;
  options.num_microbatches = accumulation;
  options.data_parallel_size = replicas;
  return options;
}

SamplerOptions Packed(int64_t micro, int64_t accumulation, int64_t replicas = 1) {
  SamplerOptions options = Plain(micro, accumulation, replicas);
  options.sample_packing = true;
  return options;
}

// "0 1|2 3" for one replica, replicas separated by " / ", an empty micro-batch as "-".
std::string Text(const StepPlan& plan) {
  std::string out;
  for (size_t replica = 0; replica < plan.microbatches.size(); ++replica) {
    if (replica > 0) out += " / ";
    for (size_t i = 0; i < plan.microbatches[replica].size(); ++i) {
      if (i > 0) out += "|";
      const std::vector<int64_t>& rows = plan.microbatches[replica][i].rows;
      if (rows.empty()) out += "-";
      for (size_t r = 0; r < rows.size(); ++r) absl::StrAppend(&out, r > 0 ? " " : "", rows[r]);
    }
  }
  return out;
}

Sampler Make(const RowSizes& sizes, const SamplerOptions& options) {
  absl::StatusOr<Sampler> sampler = Sampler::Create(sizes, options);
  EXPECT_TRUE(sampler.ok()) << sampler.status();
  return *std::move(sampler);
}

// Rows of a step in the order of the micro-batches' global index.
std::vector<std::vector<int64_t>> ByIndex(const StepPlan& plan) {
  std::vector<std::vector<int64_t>> out(plan.microbatches.size() * plan.microbatches[0].size());
  for (const auto& replica : plan.microbatches) {
    for (const Microbatch& microbatch : replica) out[microbatch.index] = microbatch.rows;
  }
  return out;
}

struct PlainCase {
  const char* what;
  int rows;
  int64_t micro, accumulation, replicas;
  std::vector<std::string> steps;  // of the first epoch and the first step of the second
};

class PlainTest : public ::testing::TestWithParam<PlainCase> {};

TEST_P(PlainTest, StepsTakeRowsInFileOrder) {
  const PlainCase& c = GetParam();
  Sampler sampler = Make(Sizes(std::vector<int32_t>(c.rows, 10)), Plain(c.micro, c.accumulation, c.replicas));
  EXPECT_EQ(sampler.StepsPerEpoch(0), static_cast<int64_t>(c.steps.size()) - 1) << c.what;
  for (size_t i = 0; i < c.steps.size(); ++i) EXPECT_EQ(Text(sampler.Step(static_cast<int64_t>(i) + 1)), c.steps[i]) << c.what << ", step " << i + 1;
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PlainTest,
    ::testing::Values(PlainCase{"an epoch of whole steps", 8, 2, 2, 1, {"0 1|2 3", "4 5|6 7", "0 1|2 3"}},
                      PlainCase{"the last step takes what is left and never reaches into the next epoch", 7, 2, 2, 1, {"0 1|2 3", "4 5|6", "0 1|2 3"}},
                      PlainCase{"a micro-batch may be left empty", 5, 2, 2, 1, {"0 1|2 3", "4|-", "0 1|2 3"}},
                      PlainCase{"fewer rows than a step", 3, 2, 4, 1, {"0 1|2|-|-", "0 1|2|-|-"}},
                      PlainCase{"micro-batch i goes to replica i mod 2", 8, 1, 2, 2, {"0|2 / 1|3", "4|6 / 5|7", "0|2 / 1|3"}},
                      PlainCase{"what is left is spread over the replicas", 6, 1, 2, 2, {"0|2 / 1|3", "4|- / 5|-", "0|2 / 1|3"}},
                      PlainCase{"one row", 1, 1, 1, 1, {"0", "0"}}));

TEST(SamplerTest, StepCarriesItsTotalsAndTheEpochAfterIt) {
  Sampler sampler = Make(Sizes({10, 20, 30, 40, 50}), Plain(2, 1));
  StepPlan plan = sampler.Step(2);
  EXPECT_EQ(plan.tokens, 70);
  EXPECT_EQ(plan.targets, 35);
  EXPECT_EQ(plan.microbatches[0][0].tokens, 70);
  EXPECT_EQ(plan.epoch_index, 0);
  EXPECT_DOUBLE_EQ(plan.epoch, 2.0 / 3);
  EXPECT_DOUBLE_EQ(sampler.Step(3).epoch, 1.0);
  plan = sampler.Step(7);
  EXPECT_EQ(plan.epoch_index, 2);
  EXPECT_DOUBLE_EQ(plan.epoch, 2.0 + 1.0 / 3);
}

TEST(SamplerTest, TotalStepsRoundsPartsOfAnEpochUp) {
  Sampler sampler = Make(Sizes(std::vector<int32_t>(10, 5)), Plain(1, 4));  // 3 steps an epoch
  EXPECT_EQ(sampler.TotalSteps(1, 0), 3);
  EXPECT_EQ(sampler.TotalSteps(3, 0), 9);
  EXPECT_EQ(sampler.TotalSteps(0.5, 0), 2);
  EXPECT_EQ(sampler.TotalSteps(1.1, 0), 4);
  EXPECT_EQ(sampler.TotalSteps(0.001, 0), 1);
  EXPECT_EQ(sampler.TotalSteps(3, 7), 7);
}

TEST(SamplerTest, ShuffledEpochsHoldEveryRowOnceInDifferentOrders) {
  SamplerOptions options = Plain(3, 2);
  options.shuffle = true;
  Sampler sampler = Make(RandomSizes(50, 64, 1), options);
  std::set<std::vector<int64_t>> orders;
  int64_t step = 0;
  for (int64_t epoch = 0; epoch < 4; ++epoch) {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < sampler.StepsPerEpoch(epoch); ++i) {
      for (const auto& rows : ByIndex(sampler.Step(++step))) order.insert(order.end(), rows.begin(), rows.end());
    }
    orders.insert(order);
    std::sort(order.begin(), order.end());
    std::vector<int64_t> all(50);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(order, all) << "epoch " << epoch;
  }
  EXPECT_EQ(orders.size(), 4u);
}

TEST(SamplerTest, TheSeedDecidesTheOrder) {
  SamplerOptions options = Plain(4, 4);
  options.shuffle = true;
  const RowSizes sizes = RandomSizes(64, 64, 1);
  Sampler a = Make(sizes, options);
  Sampler b = Make(sizes, options);
  options.seed = 43;
  Sampler c = Make(sizes, options);
  EXPECT_EQ(Text(a.Step(1)), Text(b.Step(1)));
  EXPECT_NE(Text(a.Step(1)), Text(c.Step(1)));
}

// A step's content depends on num_microbatches x data_parallel_size alone: the promise that another layout gives the same losses.
TEST(SamplerTest, ReplicasDivideAStepWithoutChangingIt) {
  for (const bool packing : {false, true}) {
    for (const auto& [accumulation, replicas] : std::vector<std::pair<int64_t, int64_t>>{{4, 2}, {2, 4}, {1, 8}}) {
      SamplerOptions one = packing ? Packed(2, 8) : Plain(2, 8);
      SamplerOptions many = packing ? Packed(2, accumulation, replicas) : Plain(2, accumulation, replicas);
      one.shuffle = many.shuffle = true;
      const RowSizes sizes = RandomSizes(101, 64, 5);
      Sampler a = Make(sizes, one);
      Sampler b = Make(sizes, many);
      ASSERT_EQ(a.TotalSteps(3, 0), b.TotalSteps(3, 0));
      for (int64_t step = 1; step <= a.TotalSteps(3, 0); ++step) {
        const StepPlan x = a.Step(step);
        const StepPlan y = b.Step(step);
        EXPECT_EQ(ByIndex(x), ByIndex(y)) << "step " << step << " on " << replicas << " replicas";
        EXPECT_EQ(x.targets, y.targets);
        EXPECT_DOUBLE_EQ(x.epoch, y.epoch);
      }
    }
  }
}

// After a resume a fresh sampler is asked for a step in the middle first.
TEST(SamplerTest, AnyStepComesOutTheSameInAnyOrder) {
  for (const bool packing : {false, true}) {
    for (const bool shuffle : {false, true}) {
      SamplerOptions options = packing ? Packed(2, 3, 2) : Plain(2, 3, 2);
      options.shuffle = shuffle;
      const RowSizes sizes = RandomSizes(77, 64, 9);
      Sampler forward = Make(sizes, options);
      std::vector<StepPlan> plans;
      for (int64_t step = 1; step <= forward.TotalSteps(4, 0); ++step) plans.push_back(forward.Step(step));
      Sampler backward = Make(sizes, options);
      for (size_t i = plans.size(); i-- > 0;) {
        const StepPlan plan = backward.Step(static_cast<int64_t>(i) + 1);
        EXPECT_EQ(Text(plan), Text(plans[i]));
        EXPECT_EQ(plan.epoch_index, plans[i].epoch_index);
        Sampler fresh = Make(sizes, options);
        EXPECT_EQ(Text(fresh.Step(static_cast<int64_t>(i) + 1)), Text(plans[i]));
      }
    }
  }
}

struct PackedCase {
  const char* what;
  std::vector<int32_t> tokens;
  std::string step;
};

class PackedTest : public ::testing::TestWithParam<PackedCase> {};

TEST_P(PackedTest, FirstFit) {
  Sampler sampler = Make(Sizes(GetParam().tokens), Packed(1, 4));  // bins of 64
  EXPECT_EQ(Text(sampler.Step(1)), GetParam().step) << GetParam().what;
}

INSTANTIATE_TEST_SUITE_P(Cases, PackedTest,
                         ::testing::Values(PackedCase{"all in one bin", {10, 20, 30}, "0 1 2|-|-|-"},
                                           PackedCase{"a full row has its own bin", {64, 64, 1}, "0|1|2|-"},
                                           PackedCase{"a later small row fills an earlier bin", {40, 40, 20, 24, 4}, "0 2 4|1 3|-|-"},
                                           PackedCase{"exactly full", {32, 32, 33, 31}, "0 1|2 3|-|-"}));

TEST(SamplerTest, BinsHoldDocumentsUpToMicroBatchSizeTimesSequenceLen) {
  Sampler sampler = Make(Sizes({64, 64, 64}), Packed(2, 2));
  EXPECT_EQ(Text(sampler.Step(1)), "0 1|2");
}

TEST(SamplerTest, PackingLooksBackOverABoundedWindow) {
  std::vector<int32_t> tokens(Sampler::kPackingWindow + 1, 60);
  tokens.push_back(4);  // fits every bin; the oldest one is out of the window
  Sampler sampler = Make(Sizes(std::move(tokens)), Packed(1, Sampler::kPackingWindow + 1));
  const StepPlan plan = sampler.Step(1);
  EXPECT_THAT(plan.microbatches[0][0].rows, ElementsAre(0));
  EXPECT_THAT(plan.microbatches[0][1].rows, ElementsAre(1, Sampler::kPackingWindow + 1));
}

TEST(SamplerTest, PackedEpochsHoldEveryRowOnceWithinCapacity) {
  SamplerOptions options = Packed(2, 3);
  options.shuffle = true;
  const RowSizes sizes = RandomSizes(500, 64, 2);
  Sampler sampler = Make(sizes, options);
  int64_t step = 0;
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::multiset<int64_t> seen;
    int64_t tokens = 0;
    for (int64_t i = 0; i < sampler.StepsPerEpoch(epoch); ++i) {
      const StepPlan plan = sampler.Step(++step);
      EXPECT_EQ(plan.epoch_index, epoch);
      tokens += plan.tokens;
      for (const Microbatch& microbatch : plan.microbatches[0]) {
        EXPECT_LE(microbatch.tokens, 128);
        seen.insert(microbatch.rows.begin(), microbatch.rows.end());
      }
    }
    EXPECT_EQ(seen.size(), 500u);
    EXPECT_EQ(std::set<int64_t>(seen.begin(), seen.end()).size(), 500u);
    EXPECT_EQ(tokens, std::accumulate(sizes.tokens.begin(), sizes.tokens.end(), int64_t{0}));
  }
  EXPECT_EQ(sampler.TotalSteps(3, 0), step);
}

TEST(SamplerTest, RefusesWhatCannotBePlanned) {
  EXPECT_THAT(Sampler::Create(Sizes({}), Plain(1, 1)).status().message(), HasSubstr("no rows"));
  EXPECT_THAT(Sampler::Create(Sizes({5, 0}), Plain(1, 1)).status().message(), HasSubstr("row 1"));
  EXPECT_THAT(Sampler::Create(Sizes({5, 65}), Packed(4, 1)).status().message(), HasSubstr("sequence_len (64)"));
  EXPECT_FALSE(Sampler::Create(Sizes({5}), Plain(0, 1)).ok());
  EXPECT_FALSE(Sampler::Create(Sizes({5}), Plain(int64_t{1} << 40, 1)).ok());
}

TEST(EvaluationPlanTest, AllRowsInFileOrderWithoutShuffle) {
  SamplerOptions options = Plain(2, 8);
  options.shuffle = true;
  absl::StatusOr<std::vector<Microbatch>> plan = EvaluationPlan(Sizes({10, 20, 30, 40, 50}), options);
  ASSERT_TRUE(plan.ok());
  ASSERT_EQ(plan->size(), 3u);
  EXPECT_THAT((*plan)[1].rows, ElementsAre(2, 3));
  EXPECT_THAT((*plan)[2].rows, ElementsAre(4));
  EXPECT_EQ((*plan)[2].index, 2);

  options.sample_packing = true;  // bins of 128
  plan = EvaluationPlan(Sizes({50, 60, 20, 64, 64}), options);
  ASSERT_TRUE(plan.ok());
  ASSERT_EQ(plan->size(), 3u);
  EXPECT_THAT((*plan)[0].rows, ElementsAre(0, 1));
  EXPECT_THAT((*plan)[1].rows, ElementsAre(2, 3));
  EXPECT_THAT((*plan)[2].rows, ElementsAre(4));
}

TEST(AssembleTest, DocumentsOneAfterTheOtherAndTargetsThatNeverCrossABorder) {
  const std::vector<uint32_t> ids = {1, 11, 12, 1, 21, 1, 31, 32, 33};
  const std::vector<uint8_t> supervised = {0, 0, 1, 1, 1, 0, 1, 0, 1};
  const std::vector<int64_t> offsets = {0, 3, 5, 9};
  const std::vector<int64_t> numbers = {1, 2, 3};
  const TokenRows rows{ids, supervised, offsets, numbers};
  const RowSizes sizes = SizesOf(rows);
  EXPECT_THAT(sizes.tokens, ElementsAre(3, 2, 4));
  EXPECT_THAT(sizes.targets, ElementsAre(1, 1, 2));  // a first token is never a target

  Microbatch microbatch;
  microbatch.rows = {2, 1};
  const MicrobatchArrays arrays = Assemble(rows, microbatch);
  EXPECT_THAT(arrays.cu_seqlens, ElementsAre(0, 4, 6));
  EXPECT_THAT(arrays.ids, ElementsAre(1, 31, 32, 33, 1, 21));
  EXPECT_THAT(arrays.target_rows, ElementsAre(0, 2, 4));
  EXPECT_THAT(arrays.target_ids, ElementsAre(31, 33, 21));

  const MicrobatchArrays nothing = Assemble(rows, Microbatch());
  EXPECT_THAT(nothing.cu_seqlens, ElementsAre(0));
  EXPECT_THAT(nothing.ids, IsEmpty());
}

}  // namespace
}  // namespace ppft::data
