#include "worker/trainer/kernels/cpu/cpu_kernels.h"
#include "worker/trainer/kernels/cpu/parallel.h"
#include "worker/trainer/kernels/cpu/rows.h"

namespace ppft::trainer::cpu {
namespace {

template <typename A>
PPFT_CPU_CLONES A RowMax(const A* x, int64_t n) {
  A lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = x[0];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (int j = 0; i + j < n; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  A max = lanes[0];
  for (int j = 1; j < kLanes; ++j) max = lanes[j] > max ? lanes[j] : max;
  return max;
}

// x = e^(x - max); returns their sum, in blocks so that long rows of floats keep their precision.
template <typename A>
PPFT_CPU_CLONES double ExpRow(A* __restrict x, int64_t n, A max) {
  constexpr int64_t kBlock = 1024;
  double sum = 0;
  for (int64_t from = 0; from < n; from += kBlock) {
    A* block = x + from;
    const int64_t size = n - from < kBlock ? n - from : kBlock;
    for (int64_t i = 0; i < size; ++i) block[i] = Exp(block[i] - max);
    sum += double(LaneSum<A>(
        size, [block](int64_t i) __attribute__((always_inline)) { return block[i]; }));
  }
  return sum;
}

template <typename A>
PPFT_CPU_CLONES void ScaleRow(A* __restrict x, int64_t n, A factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

template <typename A>
double LossOfRow(A* row, int64_t n, int64_t target, double weight, bool with_gradient) {
  const A max = RowMax<A>(row, n);
  const double logit = double(row[target]) - double(max);
  const double sum = ExpRow<A>(row, n, max);
  if (with_gradient) {
    ScaleRow<A>(row, n, A(weight / sum));
    row[target] -= A(weight);
  }
  return std::log(sum) - logit;
}

}  // namespace

void CrossEntropy(const at::Tensor& logits, const at::Tensor& targets, double weight, bool with_gradient, const at::Tensor& loss_sum) {
  DispatchFloat(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Rows<T> rows(logits);
    const int64_t n = rows.columns;
    const int64_t* target = Flat<int64_t>(targets, rows.count);
    std::vector<double> losses(rows.count);
    ParallelFor(0, rows.count, RowGrain(n), [&](int64_t begin, int64_t end) {
      std::vector<A> converted(std::is_same_v<T, A> ? 0 : n);
      for (int64_t t = begin; t < end; ++t) {
        TORCH_CHECK(target[t] >= 0 && target[t] < n, "target ", target[t], " is outside the vocabulary of ", n);
        if constexpr (std::is_same_v<T, A>) {
          losses[t] = LossOfRow<A>(rows[t], n, target[t], weight, with_gradient);
        } else {
          for (int64_t i = 0; i < n; ++i) converted[i] = A(rows[t][i]);
          losses[t] = LossOfRow<A>(converted.data(), n, target[t], weight, with_gradient);
          if (with_gradient) {
            for (int64_t i = 0; i < n; ++i) rows[t][i] = static_cast<T>(converted[i]);
          }
        }
      }
    });
    double& sum = *Flat<double>(loss_sum, 1);
    for (const double loss : losses) sum += loss;
  });
}

}  // namespace ppft::trainer::cpu
