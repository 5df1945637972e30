// Cross-entropy with its gradient in place: one block per row, which it goes over twice (maximum and sum of exponentials online, 1805.02867; then the
// gradient). As much of the row as fits stays in shared memory between the two.
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocks = 2;  // on a multiprocessor: one computes while the other waits for memory
constexpr int kAtOnce = 4;  // vectors that a thread has under way

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
__global__ void __launch_bounds__(kThreads, kBlocks) CrossEntropyKernel(Rows<T> logits, const int64_t* targets, float given_weight, const float* device_weight,
                                                                        bool with_gradient, double* row_losses, int vocab, int kept) {
  __shared__ Online shared[32];
  extern __shared__ __align__(16) unsigned char dynamic[];
  Vector<T, V>* const row_kept = reinterpret_cast<Vector<T, V>*>(dynamic);  // of the first `kept` vectors
  T* row = logits[blockIdx.x];
  const int64_t target = targets[blockIdx.x];
  assert(target >= -1 && target < vocab);
  if (target < 0) {
    if (threadIdx.x == 0) row_losses[blockIdx.x] = 0.0;
    for (int column = threadIdx.x; with_gradient && column < vocab; column += kThreads) row[column] = FromFloat<T>(0.0f);
    return;
  }
  const float weight = device_weight != nullptr ? *device_weight : given_weight;
  const float target_logit = ToFloat(row[target]);  // before anyone overwrites it: the barrier below separates

  Online online = {-INFINITY, 0.0f};
  const int vectors = vocab / V;
  for (int first = threadIdx.x; first < vectors; first += kAtOnce * kThreads) {
    Vector<T, V> x[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = first + n * kThreads;
      if (i < vectors) x[n] = Vector<T, V>::template Load<WHOLE>(row + i * V);
    }
    float max = -INFINITY;
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = first + n * kThreads;
      if (i >= vectors) break;
      if (i < kept) row_kept[i] = x[n];
#pragma unroll
      for (int j = 0; j < V; ++j) max = fmaxf(max, ToFloat(x[n].at[j]));
    }
    if (max == -INFINITY) continue;
    if (max > online.max) {
      online.sum *= Exp<T>(online.max - max);
      online.max = max;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n * kThreads >= vectors) break;
#pragma unroll
      for (int j = 0; j < V; ++j) online.sum += Exp<T>(ToFloat(x[n].at[j]) - online.max);
    }
  }
  online = WarpCombine<T>(online);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = online;
  __syncthreads();
  online = WarpCombine<T>(threadIdx.x % 32 < kThreads / 32 ? shared[threadIdx.x % 32] : Online{-INFINITY, 0.0f});
  if (threadIdx.x == 0) row_losses[blockIdx.x] = log(static_cast<double>(online.sum)) - (static_cast<double>(target_logit) - online.max);
  if (!with_gradient) return;

  const float factor = weight / online.sum;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    // What a thread kept it takes up again itself.
    Vector<T, V> x = i < kept ? row_kept[i] : Vector<T, V>::template Load<WHOLE>(row + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float gradient = Exp<T>(ToFloat(x.at[j]) - online.max) * factor;
      x.at[j] = FromFloat<T>(i * V + j == target ? gradient - weight : gradient);
    }
    x.template Store<WHOLE>(row + i * V);
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

// That the blocks of a multiprocessor of the current device may have; kReserved is what a block takes besides.
constexpr int kReserved = 2048;
int SharedBytes() {
  int device = 0, bytes = 0;
  Check(cudaGetDevice(&device), "cudaGetDevice");
  Check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

}  // namespace

void CrossEntropy(Type type, int64_t rows, int64_t vocab, Matrix logits, const int64_t* targets, float weight, const float* device_weight, bool with_gradient,
                  double* row_losses, double* loss_sum, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v, auto whole) {
      constexpr int V = decltype(v)::value;
      const auto kernel = CrossEntropyKernel<T, V, decltype(whole)::value>;
      // Whole rounds of the block's threads, as many as the device has room for.
      const int vectors = static_cast<int>(vocab / V), round = kThreads * static_cast<int>(sizeof(Vector<T, V>));
      const int rounds = with_gradient ? std::min((vectors + kThreads - 1) / kThreads, (SharedBytes() / kBlocks - kReserved) / round) : 0;
      Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, rounds * round), "CrossEntropy");
      kernel<<<rows, kThreads, rounds * round, stream>>>(Rows<T>(logits), targets, weight, device_weight, with_gradient, row_losses, static_cast<int>(vocab),
                                                         rounds * kThreads);
    };
    ByVectors<T>(vocab, Aligned<T>(logits, vocab), launch);
  });
  CheckLaunch("CrossEntropy");
  AddLossesKernel<<<1, 256, 0, stream>>>(row_losses, rows, loss_sum);
  CheckLaunch("CrossEntropy");
}

}  // namespace ppft::trainer::cuda
