#include "common/pipeline/partition.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace ppft::pipeline {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

ModelCost Even(int layers, double first, double last) { return {std::vector<double>(layers, 1.0), first, last}; }

// Of each stage of a cut.
std::vector<double> StageCosts(const ModelCost& cost, const std::vector<int>& layers_per_stage) {
  std::vector<double> costs;
  auto layer = cost.layers.begin();
  for (const int layers : layers_per_stage) {
    costs.push_back(std::accumulate(layer, layer + layers, 0.0));
    layer += layers;
  }
  costs.front() += cost.first;
  costs.back() += cost.last;
  return costs;
}

TEST(PartitionTest, CountsTheHead) {
  // A head worth four decoder layers: the last of four stages keeps one layer.
  EXPECT_THAT(*PartitionLayers(Even(16, 0, 4), 4), ElementsAre(5, 5, 5, 1));
  EXPECT_THAT(*PartitionLayers(Even(16, 0, 0), 4), ElementsAre(4, 4, 4, 4));
  EXPECT_THAT(*PartitionLayers(Even(6, 2, 2), 2), ElementsAre(3, 3));
  EXPECT_THAT(*PartitionLayers(Even(5, 0, 1.5), 2), ElementsAre(3, 2));
  EXPECT_THAT(*PartitionLayers(Even(4, 0, 100), 4), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(*PartitionLayers(Even(8, 0, 100), 3), ElementsAre(3, 4, 1));
  // Where several cuts are as good, to a hundredth, the last stage has the slack.
  EXPECT_THAT(*PartitionLayers(Even(16, 0.001, 2.8), 4), ElementsAre(5, 5, 5, 1));
  EXPECT_THAT(*PartitionLayers(Even(16, 0.001, 2.8), 2), ElementsAre(9, 7));
}

TEST(PartitionTest, IsOptimalAgainstAllCuts) {
  for (int seed = 1; seed <= 40; ++seed) {
    ModelCost cost;
    unsigned state = seed;
    const auto next = [&] { return 1.0 + (state = state * 1664525u + 1013904223u, state >> 24) % 9; };
    for (int i = 0; i < 8; ++i) cost.layers.push_back(next());
    cost.first = next();
    cost.last = next() * 2;
    for (int stages = 1; stages <= 5; ++stages) {
      double best = 1e300;
      std::vector<int> cut;
      const std::function<void(int)> walk = [&](int left) {
        if (static_cast<int>(cut.size()) + 1 == stages) {
          cut.push_back(left);
          const std::vector<double> costs = StageCosts(cost, cut);
          best = std::min(best, *std::max_element(costs.begin(), costs.end()));
          cut.pop_back();
          return;
        }
        for (int n = 1; n < left; ++n) {
          cut.push_back(n);
          walk(left - n);
          cut.pop_back();
        }
      };
      walk(8);
      absl::StatusOr<std::vector<int>> ours = PartitionLayers(cost, stages);
      ASSERT_TRUE(ours.ok()) << ours.status();
      const std::vector<double> costs = StageCosts(cost, *ours);
      EXPECT_DOUBLE_EQ(*std::max_element(costs.begin(), costs.end()), best) << "seed " << seed << " stages " << stages;
      EXPECT_EQ(std::accumulate(ours->begin(), ours->end(), 0), 8);
      EXPECT_GE(*std::min_element(ours->begin(), ours->end()), 1);
      EXPECT_GE(Imbalance(costs), 1.0);
    }
  }
}

TEST(PartitionTest, RefusesMoreStagesThanLayers) {
  EXPECT_THAT(std::string(PartitionLayers(Even(5, 0, 0), 9).status().message()), HasSubstr("9 stages are more than the model's 5 layers"));
  EXPECT_FALSE(PartitionLayers(Even(5, 0, 0), 0).ok());
}

}  // namespace
}  // namespace ppft::pipeline
