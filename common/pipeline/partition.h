// Cuts a model's layers into contiguous stages.
#pragma once

#include <vector>

#include "absl/status/statusor.h"

namespace ppft::pipeline {

// In any one unit (FLOPs, seconds): each layer, what the first stage has on top (embedding), what the last has on top (final norm, head and loss).
struct ModelCost {
  std::vector<double> layers;
  double first = 0;
  double last = 0;
};

// Layers per stage, at least one each: the largest stage cost is as small as it can be, to a hundredth. Among those cuts the last stage has the fewest layers,
// for the cost of its head follows the supervised tokens of each micro-batch and needs the slack, and the other stages are even: the least sum of squares.
// Deterministic. O(num_stages * layers^2). INVALID_ARGUMENT when num_stages < 1 or there are more stages than layers.
absl::StatusOr<std::vector<int>> PartitionLayers(const ModelCost& cost, int num_stages);

// The largest stage's cost over the mean: 1 is perfect balance.
double Imbalance(const std::vector<double>& stage_costs);

}  // namespace ppft::pipeline
