// RoPE, SwiGLU, moving of rows and columns. One block per row and part of its columns.
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kThreads = 256;

// The pair (x, y) turned by the angle of (c, s). Rounded in one way, so that all that rotates gives the same bits.
template <typename T>
__device__ __forceinline__ void Rotate(T& a, T& b, float c, float s) {
  const float x = ToFloat(a), y = ToFloat(b);
  a = FromFloat<T>(__fmaf_rn(x, c, -__fmul_rn(y, s)));
  b = FromFloat<T>(__fmaf_rn(y, c, __fmul_rn(x, s)));
}

template <typename T, int V>
__global__ void RopeKernel(Rows<T> qkv, int heads, int half, const float* cos, const float* sin, int64_t table_stride, int64_t positions,
                           const int32_t* position, float sign) {
  const int64_t row = blockIdx.x;
  const int32_t p = position[row];
  assert(p >= 0 && p < positions);
  const int per_head = half / V;
  for (int item = threadIdx.x; item < heads * per_head; item += blockDim.x) {
    const int column = item % per_head * V;
    T* first = qkv[row] + static_cast<int64_t>(item / per_head) * 2 * half + column;
    T* second = first + half;
    const float* c = cos + p * table_stride + column;
    const float* s = sin + p * table_stride + column;
    Vector<T, V> a = Vector<T, V>::Load(first), b = Vector<T, V>::Load(second);
#pragma unroll
    for (int j = 0; j < V; ++j) Rotate(a.at[j], b.at[j], c[j], sign * s[j]);
    a.Store(first);
    b.Store(second);
  }
}

// Packed rows [q | k | v] to parts (kToParts) or back; q and k are rotated on the way, v is copied. An item is V columns of a head's first half and the V that
// they are paired with.
template <typename T, int V, bool kToParts>
__global__ void RopePartsKernel(Rows<T> packed, Rows<T> q, Rows<T> k, Rows<T> v, int q_heads, int kv_heads, int half, const float* cos, const float* sin,
                                int64_t table_stride, int64_t positions, const int32_t* position) {
  const int64_t row = blockIdx.x;
  const int32_t p = position[row];
  assert(p >= 0 && p < positions);
  const int per_head = half / V, rotated = q_heads + kv_heads;
  for (int item = threadIdx.x; item < (rotated + kv_heads) * per_head; item += blockDim.x) {
    const int head = item / per_head, column = item % per_head * V;
    T* wide = packed[row] + static_cast<int64_t>(head) * 2 * half + column;
    T* part = (head < q_heads   ? q[row] + static_cast<int64_t>(head) * 2 * half
               : head < rotated ? k[row] + static_cast<int64_t>(head - q_heads) * 2 * half
                                : v[row] + static_cast<int64_t>(head - rotated) * 2 * half) +
              column;
    const T* from = kToParts ? wide : part;
    T* to = kToParts ? part : wide;
    Vector<T, V> a = Vector<T, V>::Load(from), b = Vector<T, V>::Load(from + half);
    if (head < rotated) {
      const float* c = cos + p * table_stride + column;
      const float* s = sin + p * table_stride + column;
#pragma unroll
      for (int j = 0; j < V; ++j) Rotate(a.at[j], b.at[j], c[j], kToParts ? s[j] : -s[j]);
    }
    a.Store(to);
    b.Store(to + half);
  }
}

// 1 / (1 + e^-x); the narrow types round off far more than the fast exponential does.
template <typename T>
__device__ __forceinline__ float Sigmoid(float x) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

template <typename T, int V>
__global__ void SwiGluKernel(Rows<T> gate_up, Rows<T> out, int columns) {
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (column >= columns) return;
  const Vector<T, V> gate = Vector<T, V>::Load(gate_up[row] + column), up = Vector<T, V>::Load(gate_up[row] + columns + column);
  Vector<T, V> result;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float g = ToFloat(gate.at[j]);
    result.at[j] = FromFloat<T>(g * Sigmoid<T>(g) * ToFloat(up.at[j]));
  }
  result.Store(out[row] + column);
}

// dgate_up may be gate_up and gated (or nothing) dout: a thread reads what it overwrites before.
template <typename T, int V>
__global__ void SwiGluBackwardKernel(Rows<T> dout, Rows<T> gate_up, Rows<T> dgate_up, Rows<T> gated, int columns) {
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (column >= columns) return;
  const Vector<T, V> gradient = Vector<T, V>::Load(dout[row] + column);
  Vector<T, V> gate = Vector<T, V>::Load(gate_up[row] + column), up = Vector<T, V>::Load(gate_up[row] + columns + column), out;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float g = ToFloat(gate.at[j]), u = ToFloat(up.at[j]), d = ToFloat(gradient.at[j]), s = Sigmoid<T>(g);
    out.at[j] = FromFloat<T>(g * s * u);
    gate.at[j] = FromFloat<T>(d * u * s * (1.0f + g * (1.0f - s)));
    up.at[j] = FromFloat<T>(d * g * s);
  }
  gate.Store(dgate_up[row] + column);
  up.Store(dgate_up[row] + columns + column);
  if (gated.data != nullptr) out.Store(gated[row] + column);
}

template <typename T, int V>
__global__ void JoinColumnsKernel(Rows<T> first, Rows<T> second, Rows<T> third, int64_t n1, int64_t n2, int64_t n3, Rows<T> out) {
  const int64_t row = blockIdx.x;
  for (int64_t column = threadIdx.x * V; column < n1 + n2 + n3; column += blockDim.x * V) {
    const T* from = column < n1 ? first[row] + column : column < n1 + n2 ? second[row] + (column - n1) : third[row] + (column - n1 - n2);
    Vector<T, V>::Load(from).Store(out[row] + column);
  }
}

template <typename T, int V>
__global__ void SpreadRowsKernel(Rows<T> from, const int32_t* row_of, Rows<T> out, int columns) {
  const int64_t row = blockIdx.x;
  const int32_t source = row_of[row];
  for (int column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
    Vector<T, V> x;
    if (source >= 0) {
      x = Vector<T, V>::Load(from[source] + column);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) x.at[j] = FromFloat<T>(0.0f);
    }
    x.Store(out[row] + column);
  }
}

// Rows in x, parts of the columns in y.
dim3 GridOf(int64_t rows, int64_t vectors) { return dim3(static_cast<unsigned>(rows), static_cast<unsigned>((vectors + kThreads - 1) / kThreads)); }

}  // namespace

void Rope(Type type, int64_t rows, int heads, int half, Matrix qkv, const float* cos, const float* sin, int64_t table_stride, int64_t positions,
          const int32_t* position, bool inverse, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const int threads = std::min(kThreads, (heads * half / V + 31) / 32 * 32);
      RopeKernel<T, V><<<rows, threads, 0, stream>>>(Rows<T>(qkv), heads, half, cos, sin, table_stride, positions, position, inverse ? -1.0f : 1.0f);
    };
    Aligned<T>(qkv, half) ? launch(std::integral_constant<int, 16 / sizeof(T)>{}) : launch(std::integral_constant<int, 1>{});
  });
  CheckLaunch("Rope");
}

namespace {

template <bool kToParts>
void LaunchRopeParts(Type type, int64_t rows, int half, Matrix packed, const Parts& p, const float* cos, const float* sin, int64_t table_stride,
                     int64_t positions, const int32_t* position, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const int q_heads = static_cast<int>(p.columns[0] / (2 * half)), kv_heads = static_cast<int>(p.columns[1] / (2 * half));
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const int threads = std::min(kThreads, ((q_heads + 2 * kv_heads) * half / V + 31) / 32 * 32);
      RopePartsKernel<T, V, kToParts><<<rows, threads, 0, stream>>>(Rows<T>(packed), Rows<T>(p.parts[0]), Rows<T>(p.parts[1]), Rows<T>(p.parts[2]), q_heads,
                                                                    kv_heads, half, cos, sin, table_stride, positions, position);
    };
    bool vectors = Aligned<T>(packed, half);
    for (const Matrix& part : p.parts) vectors = vectors && Aligned<T>(part, half);
    vectors ? launch(std::integral_constant<int, 16 / sizeof(T)>{}) : launch(std::integral_constant<int, 1>{});
  });
  CheckLaunch("Rope");
}

}  // namespace

void RopeToParts(Type type, int64_t rows, int half, Matrix packed, const Parts& parts, const float* cos, const float* sin, int64_t table_stride,
                 int64_t positions, const int32_t* position, cudaStream_t stream) {
  LaunchRopeParts<true>(type, rows, half, packed, parts, cos, sin, table_stride, positions, position, stream);
}

void RopeFromParts(Type type, int64_t rows, int half, const Parts& parts, Matrix packed, const float* cos, const float* sin, int64_t table_stride,
                   int64_t positions, const int32_t* position, cudaStream_t stream) {
  LaunchRopeParts<false>(type, rows, half, packed, parts, cos, sin, table_stride, positions, position, stream);
}

void SwiGlu(Type type, int64_t rows, int64_t columns, Matrix gate_up, Matrix out, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      SwiGluKernel<T, V><<<GridOf(rows, columns / V), kThreads, 0, stream>>>(Rows<T>(gate_up), Rows<T>(out), static_cast<int>(columns));
    };
    Aligned<T>(gate_up, columns) && Aligned<T>(out, columns) ? launch(std::integral_constant<int, 16 / sizeof(T)>{}) : launch(std::integral_constant<int, 1>{});
  });
  CheckLaunch("SwiGlu");
}

void SwiGluBackward(Type type, int64_t rows, int64_t columns, Matrix dout, Matrix gate_up, Matrix dgate_up, Matrix gated, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      SwiGluBackwardKernel<T, V>
          <<<GridOf(rows, columns / V), kThreads, 0, stream>>>(Rows<T>(dout), Rows<T>(gate_up), Rows<T>(dgate_up), Rows<T>(gated), static_cast<int>(columns));
    };
    const bool vectors = Aligned<T>(dout, columns) && Aligned<T>(gate_up, columns) && Aligned<T>(dgate_up, columns) && Aligned<T>(gated, columns);
    vectors ? launch(std::integral_constant<int, 16 / sizeof(T)>{}) : launch(std::integral_constant<int, 1>{});
  });
  CheckLaunch("SwiGluBackward");
}

void JoinColumns(Type type, int64_t rows, const Matrix (&parts)[3], const int64_t (&columns)[3], Matrix out, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v) {
      JoinColumnsKernel<T, decltype(v)::value>
          <<<rows, kThreads, 0, stream>>>(Rows<T>(parts[0]), Rows<T>(parts[1]), Rows<T>(parts[2]), columns[0], columns[1], columns[2], Rows<T>(out));
    };
    bool vectors = Aligned<T>(out, columns[0]);
    for (int i = 0; i < 3; ++i) vectors = vectors && Aligned<T>(parts[i], columns[i]);
    vectors ? launch(std::integral_constant<int, 16 / sizeof(T)>{}) : launch(std::integral_constant<int, 1>{});
  });
  CheckLaunch("JoinColumns");
}

void SpreadRows(Type type, int64_t rows, int64_t columns, Matrix from, const int32_t* row_of, Matrix out, cudaStream_t stream) {
  if (rows == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const int threads = static_cast<int>(std::min<int64_t>(kThreads, (columns / V + 31) / 32 * 32));
      SpreadRowsKernel<T, V><<<rows, threads, 0, stream>>>(Rows<T>(from), row_of, Rows<T>(out), static_cast<int>(columns));
    };
    Aligned<T>(from, columns) && Aligned<T>(out, columns) ? launch(std::integral_constant<int, 16 / sizeof(T)>{}) : launch(std::integral_constant<int, 1>{});
  });
  CheckLaunch("SpreadRows");
}

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace ppft::trainer::cuda
