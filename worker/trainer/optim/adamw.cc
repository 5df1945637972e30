#include "worker/trainer/optim/adamw.h"

#include <algorithm>
#include <cmath>

namespace ppft::trainer {
namespace {

// The scalars of one update, rounded to fp32 where torch does.
struct Scalars {
  float decay;            // 1 - lr * weight_decay
  float one_minus_beta1;  // weight of lerp
  float beta2;
  float one_minus_beta2;
  float correction2_sqrt;
  float epsilon;
  float minus_step_size;
  float gradient_factor;
};

void Update(const Scalars& s, int64_t size, const float* __restrict gradient, float* __restrict master, float* __restrict exp_avg,
            float* __restrict exp_avg_sq) {
  for (int64_t i = 0; i < size; ++i) {
    const float g = gradient[i] * s.gradient_factor;
    const float m = exp_avg[i] + s.one_minus_beta1 * (g - exp_avg[i]);
    const float v = exp_avg_sq[i] * s.beta2 + s.one_minus_beta2 * g * g;
    const float denominator = std::sqrt(v) / s.correction2_sqrt + s.epsilon;
    master[i] = master[i] * s.decay + s.minus_step_size * (m / denominator);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
}

}  // namespace

AdamW::AdamW(const AdamWOptions& options, std::vector<ParameterSpan> parameters, int64_t begin, int64_t end)
    : options_(options), parameters_(std::move(parameters)), begin_(begin), end_(end), exp_avg_(end - begin), exp_avg_sq_(end - begin) {}

void AdamW::Step(int64_t update, double learning_rate, double gradient_factor) {
  const double correction1 = 1.0 - std::pow(options_.beta1, static_cast<double>(update));
  const double correction2 = 1.0 - std::pow(options_.beta2, static_cast<double>(update));
  Scalars s;
  s.decay = static_cast<float>(1.0 - learning_rate * options_.weight_decay);
  s.one_minus_beta1 = static_cast<float>(1.0 - options_.beta1);
  s.beta2 = static_cast<float>(options_.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - options_.beta2);
  s.correction2_sqrt = static_cast<float>(std::sqrt(correction2));
  s.epsilon = static_cast<float>(options_.epsilon);
  s.minus_step_size = static_cast<float>(-learning_rate / correction1);
  s.gradient_factor = static_cast<float>(gradient_factor);
  int64_t offset = 0;
  for (const ParameterSpan& parameter : parameters_) {
    const int64_t first = std::max(begin_, offset);
    const int64_t last = std::min(end_, offset + parameter.size);
    if (first < last) {
      Update(s, last - first, parameter.gradient + (first - offset), parameter.master + (first - offset), exp_avg_.data() + (first - begin_),
             exp_avg_sq_.data() + (first - begin_));
    }
    offset += parameter.size;
  }
}

double SumOfSquares(const float* values, int64_t size) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(values[i + lane]) * values[i + lane];
  }
  for (int lane = 0; i < size; ++i, ++lane) lanes[lane] += static_cast<double>(values[i]) * values[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

double ClipFactor(double norm, double max_norm) { return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0; }

}  // namespace ppft::trainer
