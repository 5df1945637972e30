// Runs AdamW for the comparison with torch: adamw_run SHARDS LR BETA1 BETA2 EPSILON DECAY MAX_NORM STEPS SIZE... reads fp32 from standard input (the
// parameters, then STEPS gradients) and writes fp32 after each step to standard output. The flat buffer is cut into SHARDS ranges, each with an optimizer.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "worker/trainer/optim/adamw.h"

int main(int argc, char** argv) {
  using namespace ppft::trainer;
  if (argc < 10) return 2;
  const int shards = std::atoi(argv[1]);
  const double learning_rate = std::atof(argv[2]);
  AdamWOptions options;
  options.beta1 = std::atof(argv[3]);
  options.beta2 = std::atof(argv[4]);
  options.epsilon = std::atof(argv[5]);
  options.weight_decay = std::atof(argv[6]);
  const double max_norm = std::atof(argv[7]);
  const int steps = std::atoi(argv[8]);
  std::vector<std::vector<float>> masters, gradients;
  for (int i = 9; i < argc; ++i) masters.emplace_back(std::atoll(argv[i]));
  gradients = masters;
  std::vector<ParameterSpan> spans;
  int64_t total = 0;
  for (size_t i = 0; i < masters.size(); ++i) {
    spans.push_back({"p", masters[i].data(), gradients[i].data(), static_cast<int64_t>(masters[i].size())});
    total += spans.back().size;
  }
  std::vector<AdamW> optimizers;
  for (int s = 0; s < shards; ++s) optimizers.emplace_back(options, spans, total * s / shards, total * (s + 1) / shards);
  const auto read = [](std::vector<float>& values) { return std::fread(values.data(), sizeof(float), values.size(), stdin) == values.size(); };
  for (auto& master : masters) {
    if (!read(master)) return 1;
  }
  for (int step = 1; step <= steps; ++step) {
    double squares = 0;
    for (auto& gradient : gradients) {
      if (!read(gradient)) return 1;
      squares += SumOfSquares(gradient.data(), static_cast<int64_t>(gradient.size()));
    }
    for (AdamW& optimizer : optimizers) optimizer.Step(step, learning_rate, ClipFactor(std::sqrt(squares), max_norm));
    for (auto& master : masters) std::fwrite(master.data(), sizeof(float), master.size(), stdout);
  }
  return 0;
}
