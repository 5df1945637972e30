#include "common/pipeline/partition.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace ppft::pipeline {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

// Cost of the stage that holds layers [begin, end).
class SpanCost {
 public:
  explicit SpanCost(const ModelCost& cost) : cost_(cost), prefix_(cost.layers.size() + 1, 0.0) {
    for (size_t i = 0; i < cost.layers.size(); ++i) prefix_[i + 1] = prefix_[i] + cost.layers[i];
  }
  double operator()(int begin, int end) const {
    double span = prefix_[end] - prefix_[begin];
    if (begin == 0) span += cost_.first;
    if (end + 1 == static_cast<int>(prefix_.size())) span += cost_.last;
    return span;
  }

 private:
  const ModelCost& cost_;
  std::vector<double> prefix_;
};

}  // namespace

absl::StatusOr<std::vector<int>> PartitionLayers(const ModelCost& cost, int num_stages) {
  const int num_layers = static_cast<int>(cost.layers.size());
  if (num_stages < 1) return absl::InvalidArgumentError(absl::StrCat("number of stages (", num_stages, ") must be at least 1"));
  if (num_stages > num_layers) return absl::InvalidArgumentError(absl::StrCat(num_stages, " stages are more than the model's ", num_layers, " layers"));
  const SpanCost span(cost);

  // worst[s][n]: the smallest possible largest cost of the first s stages over the first n layers.
  std::vector<std::vector<double>> worst(num_stages + 1, std::vector<double>(num_layers + 1, kInfinite));
  worst[0][0] = 0;
  for (int s = 1; s <= num_stages; ++s) {
    for (int n = s; n <= num_layers; ++n) {
      for (int begin = s - 1; begin < n; ++begin) worst[s][n] = std::min(worst[s][n], std::max(worst[s - 1][begin], span(begin, n)));
    }
  }
  // Among the cuts that reach it within a hundredth (costs are no more exact), the shortest last stage, then the smallest sum of squares; ties take the
  // earliest cut.
  const double limit = worst[num_stages][num_layers] * 1.01;
  int last_begin = num_stages - 1;
  for (int begin = last_begin; begin < num_layers; ++begin) {
    if (worst[num_stages - 1][begin] <= limit && span(begin, num_layers) <= limit) last_begin = begin;
  }
  std::vector<std::vector<double>> squares(num_stages + 1, std::vector<double>(num_layers + 1, kInfinite));
  std::vector<std::vector<int>> cut(num_stages + 1, std::vector<int>(num_layers + 1, -1));
  squares[0][0] = 0;
  for (int s = 1; s <= num_stages; ++s) {
    for (int n = s; n <= num_layers; ++n) {
      for (int begin = s - 1; begin < n; ++begin) {
        const double c = span(begin, n);
        if (c > limit || squares[s - 1][begin] == kInfinite || (s == num_stages && n == num_layers && begin != last_begin)) continue;
        const double sum = squares[s - 1][begin] + c * c;
        if (sum < squares[s][n] * (1 - 1e-12)) {
          squares[s][n] = sum;
          cut[s][n] = begin;
        }
      }
    }
  }
  std::vector<int> layers_per_stage(num_stages);
  for (int s = num_stages, n = num_layers; s > 0; --s) {
    layers_per_stage[s - 1] = n - cut[s][n];
    n = cut[s][n];
  }
  return layers_per_stage;
}

double Imbalance(const std::vector<double>& stage_costs) {
  if (stage_costs.empty()) return 1;
  const double sum = std::accumulate(stage_costs.begin(), stage_costs.end(), 0.0);
  return sum > 0 ? *std::max_element(stage_costs.begin(), stage_costs.end()) * stage_costs.size() / sum : 1;
}

}  // namespace ppft::pipeline
