// What the kernels share: element types, 16-byte vectors, sums over a block, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "worker/trainer/kernels/cuda/launch.h"

namespace ppft::trainer::cuda {

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}

// N elements, which are moved at once where p is aligned (WHOLE) and one by one elsewhere.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];

  template <bool WHOLE = true>
  static __device__ __forceinline__ Vector Load(const T* p) {
    if constexpr (WHOLE) {
      return *reinterpret_cast<const Vector*>(p);
    } else {
      Vector x;
#pragma unroll
      for (int j = 0; j < N; ++j) x.at[j] = p[j];
      return x;
    }
  }
  template <bool WHOLE = true>
  __device__ __forceinline__ void Store(T* p) const {
    if constexpr (WHOLE) {
      *reinterpret_cast<Vector*>(p) = *this;
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) p[j] = at[j];
    }
  }
};

// A matrix's rows with their element type.
template <typename T>
struct Rows {
  explicit Rows(Matrix m) : data(static_cast<T*>(m.data)), stride(m.stride) {}
  __device__ __forceinline__ T* operator[](int64_t row) const { return data + row * stride; }

  T* data;
  int64_t stride;
};

__device__ __forceinline__ float WarpSum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over the block's threads (a multiple of 32), for all of them. One call per kernel and `shared`.
__device__ __forceinline__ float BlockSum(float x, float* shared /* [32] */) {
  x = WarpSum(x);
  const int warps = blockDim.x / 32;
  if (warps == 1) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return WarpSum(static_cast<int>(threadIdx.x % 32) < warps ? shared[threadIdx.x % 32] : 0.0f);
}

inline void CheckLaunch(const char* what) { Check(cudaGetLastError(), what); }

// Whether rows of `columns` elements may be moved in vectors of `bytes`.
template <typename T>
bool Aligned(Matrix m, int64_t columns, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(m.data) % bytes == 0 && m.stride * sizeof(T) % bytes == 0 && columns * sizeof(T) % bytes == 0;
}

// For kernels that sum over a row: calls launch(V, WHOLE) as integral constants. V depends on the columns alone, so that a sum's order does too;
// WHOLE (`aligned`, or single elements) says how V elements are moved.
template <typename T, typename Launch>
void ByVectors(int64_t columns, bool aligned, Launch&& launch) {
  constexpr int kWide = 16 / sizeof(T);
  if (columns % kWide != 0) return launch(std::integral_constant<int, 1>{}, std::true_type{});
  aligned ? launch(std::integral_constant<int, kWide>{}, std::true_type{}) : launch(std::integral_constant<int, kWide>{}, std::false_type{});
}

// Calls body(T{}) with the device's type.
template <typename Body>
void Dispatch(Type type, Body&& body) {
  switch (type) {
    case Type::kFloat:
      return body(float{});
    case Type::kBFloat16:
      return body(__nv_bfloat16{});
    case Type::kHalf:
      return body(__half{});
  }
}

}  // namespace ppft::trainer::cuda
