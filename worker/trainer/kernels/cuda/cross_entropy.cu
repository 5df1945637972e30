// Cross-entropy with its gradient in place: one block per row, which it reads twice (maximum and sum of exponentials online, 1805.02867; then the gradient).
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kThreads = 1024;

template <typename T>
__device__ __forceinline__ float Exp(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return __expf(x);
}

// The maximum of some numbers and the sum of e^(number - maximum).
struct Online {
  float max;
  float sum;
};

template <typename T>
__device__ __forceinline__ Online Combine(Online a, Online b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return {max, 0.0f};
  return {max, a.sum * Exp<T>(a.max - max) + b.sum * Exp<T>(b.max - max)};
}

template <typename T>
__device__ __forceinline__ Online WarpCombine(Online x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = Combine<T>(x, {__shfl_xor_sync(0xffffffffu, x.max, offset), __shfl_xor_sync(0xffffffffu, x.sum, offset)});
  }
  return x;
}

template <typename T, int V, bool WHOLE>
__global__ void __launch_bounds__(kThreads)
    CrossEntropyKernel(Rows<T> logits, const int64_t* targets, float weight, bool with_gradient, double* row_losses, int vocab) {
  __shared__ Online shared[32];
  T* row = logits[blockIdx.x];
  const int64_t target = targets[blockIdx.x];
  assert(target >= 0 && target < vocab);
  const float target_logit = ToFloat(row[target]);  // before anyone overwrites it: the barrier below separates

  Online online = {-INFINITY, 0.0f};
  for (int column = threadIdx.x * V; column < vocab; column += kThreads * V) {
    const Vector<T, V> x = Vector<T, V>::template Load<WHOLE>(row + column);
    float max = ToFloat(x.at[0]);
#pragma unroll
    for (int j = 1; j < V; ++j) max = fmaxf(max, ToFloat(x.at[j]));
    if (max == -INFINITY) continue;
    if (max > online.max) {
      online.sum *= Exp<T>(online.max - max);
      online.max = max;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) online.sum += Exp<T>(ToFloat(x.at[j]) - online.max);
  }
  online = WarpCombine<T>(online);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = online;
  __syncthreads();
  online = WarpCombine<T>(shared[threadIdx.x % 32]);
  if (threadIdx.x == 0) row_losses[blockIdx.x] = log(static_cast<double>(online.sum)) - (static_cast<double>(target_logit) - online.max);
  if (!with_gradient) return;

  const float factor = weight / online.sum;
  for (int column = threadIdx.x * V; column < vocab; column += kThreads * V) {
    Vector<T, V> x = Vector<T, V>::template Load<WHOLE>(row + column);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float gradient = Exp<T>(ToFloat(x.at[j]) - online.max) * factor;
      x.at[j] = FromFloat<T>(column + j == target ? gradient - weight : gradient);
    }
    x.template Store<WHOLE>(row + column);
  }
}

// One block: the sum's order depends on the number of rows alone.
__global__ void AddLossesKernel(const double* row_losses, int64_t rows, double* loss_sum) {
  __shared__ double shared[256];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) sum += row_losses[i];
  shared[threadIdx.x] = sum;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss_sum += shared[0];
}

}  // namespace

void CrossEntropy(Type type, int64_t rows, int64_t vocab, Matrix logits, const int64_t* targets, double weight, bool with_gradient, double* row_losses,
                  double* loss_sum, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v, auto whole) {
      CrossEntropyKernel<T, decltype(v)::value, decltype(whole)::value>
          <<<rows, kThreads, 0, stream>>>(Rows<T>(logits), targets, static_cast<float>(weight), with_gradient, row_losses, static_cast<int>(vocab));
    };
    ByVectors<T>(vocab, Aligned<T>(logits, vocab), launch);
  });
  CheckLaunch("CrossEntropy");
  AddLossesKernel<<<1, 256, 0, stream>>>(row_losses, rows, loss_sum);
  CheckLaunch("CrossEntropy");
}

}  // namespace ppft::trainer::cuda
