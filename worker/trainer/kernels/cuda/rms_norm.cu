// Residual addition and RMSNorm. One block per row; the row stays in registers between its two uses.
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kMaxThreads = 512;

template <typename T, int V, int ITEMS, bool WHOLE>
__global__ void __launch_bounds__(kMaxThreads)
    AddRmsNormKernel(Rows<T> x, Rows<T> delta, const T* weight, float eps, Rows<T> sum, Rows<T> normed, float* rstd, int columns) {
  __shared__ float shared[32];
  const int64_t row = blockIdx.x;
  Vector<T, V> held[ITEMS];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int column = (i * blockDim.x + threadIdx.x) * V;
    if (column >= columns) break;
    held[i] = Vector<T, V>::template Load<WHOLE>(x[row] + column);
    if (delta.data != nullptr) {
      const Vector<T, V> d = Vector<T, V>::template Load<WHOLE>(delta[row] + column);
#pragma unroll
      for (int j = 0; j < V; ++j) held[i].at[j] = FromFloat<T>(ToFloat(held[i].at[j]) + ToFloat(d.at[j]));
      held[i].template Store<WHOLE>(sum[row] + column);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) squares += ToFloat(held[i].at[j]) * ToFloat(held[i].at[j]);
  }
  const float scale = 1.0f / sqrtf(BlockSum(squares, shared) / columns + eps);
  if (threadIdx.x == 0) rstd[row] = scale;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int column = (i * blockDim.x + threadIdx.x) * V;
    if (column >= columns) break;
    const Vector<T, V> w = Vector<T, V>::template Load<WHOLE>(weight + column);
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = FromFloat<T>(ToFloat(held[i].at[j]) * scale * ToFloat(w.at[j]));
    out.template Store<WHOLE>(normed[row] + column);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) ApplyRmsNormKernel(Rows<T> x, const float* rstd, const T* weight, Rows<T> normed, int columns) {
  const int64_t row = blockIdx.x;
  const float scale = rstd[row];
  for (int column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
    const Vector<T, V> in = Vector<T, V>::Load(x[row] + column);
    const Vector<T, V> w = Vector<T, V>::Load(weight + column);
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = FromFloat<T>(ToFloat(in.at[j]) * scale * ToFloat(w.at[j]));
    out.Store(normed[row] + column);
  }
}

template <typename T, int V, int ITEMS, bool WHOLE>
__global__ void __launch_bounds__(kMaxThreads)
    RmsNormBackwardKernel(Rows<T> dnormed, Rows<T> x, const float* rstd, const T* weight, Rows<T> dx, Rows<T> normed, int columns) {
  __shared__ float shared[32];
  const int64_t row = blockIdx.x;
  const float scale = rstd[row];
  Vector<T, V> dn[ITEMS], in[ITEMS];
  float dot = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int column = (i * blockDim.x + threadIdx.x) * V;
    if (column >= columns) break;
    dn[i] = Vector<T, V>::template Load<WHOLE>(dnormed[row] + column);
    in[i] = Vector<T, V>::template Load<WHOLE>(x[row] + column);
    const Vector<T, V> w = Vector<T, V>::template Load<WHOLE>(weight + column);
#pragma unroll
    for (int j = 0; j < V; ++j) dot += ToFloat(dn[i].at[j]) * ToFloat(w.at[j]) * ToFloat(in[i].at[j]);
  }
  const float mean = BlockSum(dot, shared) * scale / columns;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int column = (i * blockDim.x + threadIdx.x) * V;
    if (column >= columns) break;
    const Vector<T, V> w = Vector<T, V>::template Load<WHOLE>(weight + column);
    Vector<T, V> out = Vector<T, V>::template Load<WHOLE>(dx[row] + column);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float gradient = scale * (ToFloat(dn[i].at[j]) * ToFloat(w.at[j]) - ToFloat(in[i].at[j]) * scale * mean);
      out.at[j] = FromFloat<T>(ToFloat(out.at[j]) + gradient);
    }
    out.template Store<WHOLE>(dx[row] + column);
    if (normed.data == nullptr) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = FromFloat<T>(ToFloat(in[i].at[j]) * scale * ToFloat(w.at[j]));
    out.template Store<WHOLE>(normed[row] + column);
  }
}

// Calls body(threads, ITEMS) so that threads * ITEMS vectors hold a row.
template <int V, typename Body>
void ByRowLength(int64_t columns, Body&& body) {
  const int64_t vectors = columns / V;
  const auto threads = [vectors](int items) { return static_cast<int>((((vectors + items - 1) / items) + 31) / 32 * 32); };
  if (vectors <= kMaxThreads) return body(threads(1), std::integral_constant<int, 1>{});
  if (vectors <= 2 * kMaxThreads) return body(threads(2), std::integral_constant<int, 2>{});
  if constexpr (V > 1) {
    if (vectors <= 8 * kMaxThreads) return body(threads(8), std::integral_constant<int, 8>{});
  } else {
    if (vectors <= 32 * kMaxThreads) return body(threads(32), std::integral_constant<int, 32>{});
  }
  throw std::runtime_error("rms norm: rows of " + std::to_string(columns) + " columns are too long");
}

}  // namespace

void AddRmsNorm(Type type, int64_t rows, int64_t columns, Matrix x, Matrix delta, const void* weight, float eps, Matrix sum, Matrix normed, float* rstd,
                cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v, auto whole) {
      constexpr int V = decltype(v)::value;
      ByRowLength<V>(columns, [&](int threads, auto items) {
        AddRmsNormKernel<T, V, decltype(items)::value, decltype(whole)::value><<<rows, threads, 0, stream>>>(
            Rows<T>(x), Rows<T>(delta), static_cast<const T*>(weight), eps, Rows<T>(sum), Rows<T>(normed), rstd, static_cast<int>(columns));
      });
    };
    const bool aligned = Aligned<T>(x, columns) && Aligned<T>(delta, columns) && Aligned<T>(sum, columns) && Aligned<T>(normed, columns) &&
                         reinterpret_cast<uintptr_t>(weight) % 16 == 0;
    ByVectors<T>(columns, aligned, launch);
  });
  CheckLaunch("AddRmsNorm");
}

void ApplyRmsNorm(Type type, int64_t rows, int64_t columns, Matrix x, const float* rstd, const void* weight, Matrix normed, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const int threads = static_cast<int>(std::min<int64_t>(256, (columns / V + 31) / 32 * 32));
      ApplyRmsNormKernel<T, V><<<rows, threads, 0, stream>>>(Rows<T>(x), rstd, static_cast<const T*>(weight), Rows<T>(normed), static_cast<int>(columns));
    };
    const bool vectors = Aligned<T>(x, columns) && Aligned<T>(normed, columns) && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
    vectors ? launch(std::integral_constant<int, 16 / sizeof(T)>{}) : launch(std::integral_constant<int, 1>{});
  });
  CheckLaunch("ApplyRmsNorm");
}

void RmsNormBackward(Type type, int64_t rows, int64_t columns, Matrix dnormed, Matrix x, const float* rstd, const void* weight, Matrix dx, Matrix normed,
                     cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v, auto whole) {
      constexpr int V = decltype(v)::value;
      ByRowLength<V>(columns, [&](int threads, auto items) {
        RmsNormBackwardKernel<T, V, decltype(items)::value, decltype(whole)::value><<<rows, threads, 0, stream>>>(
            Rows<T>(dnormed), Rows<T>(x), rstd, static_cast<const T*>(weight), Rows<T>(dx), Rows<T>(normed), static_cast<int>(columns));
      });
    };
    const bool aligned = Aligned<T>(dnormed, columns) && Aligned<T>(x, columns) && Aligned<T>(dx, columns) && Aligned<T>(normed, columns) &&
                         reinterpret_cast<uintptr_t>(weight) % 16 == 0;
    ByVectors<T>(columns, aligned, launch);
  });
  CheckLaunch("RmsNormBackward");
}

}  // namespace ppft::trainer::cuda
