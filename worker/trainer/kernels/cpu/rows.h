// Loops over the columns of one row, written so that the compiler vectorises them. A function marked PPFT_CPU_CLONES is compiled for AVX-512, AVX2 and plain
// x86-64 and picked when the program starts; sums run in 16 fixed lanes and products are never fused (-ffp-contract=off), so all three give the same bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#define PPFT_CPU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PPFT_CPU_CLONES
#endif
#define PPFT_INLINE inline __attribute__((always_inline))

namespace ppft::trainer::cpu {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kLanes = 16;

// e^x within 1.5 ulp (Cephes' polynomial); x at or below -87 gives e^-87, at or above 88 e^88.
PPFT_INLINE float Exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer held in the low bits
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * __builtin_bit_cast(float, (__builtin_bit_cast(int32_t, shifted) << 23) + 0x3f800000);
}
PPFT_INLINE double Exp(double x) { return std::exp(x); }

template <typename A>
PPFT_INLINE A Sigmoid(A x) {
  return A(1) / (A(1) + Exp(-x));
}

// Sum of term(i) for i in [0, n) in a fixed order.
template <typename A, typename Term>
PPFT_INLINE A LaneSum(int64_t n, Term term) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += term(i + j);
  A sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

// A 2-D tensor's rows as raw pointers.
template <typename T>
struct Rows {
  explicit Rows(const at::Tensor& t) : data(static_cast<T*>(t.data_ptr())), stride(t.stride(0)), count(t.size(0)), columns(t.size(1)) {
    TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1), "rows must have their columns side by side");
    TORCH_CHECK(t.scalar_type() == c10::CppTypeToScalarType<T>::value, "unexpected dtype ", t.scalar_type());
  }
  T* operator[](int64_t row) const { return data + row * stride; }

  T* data;
  int64_t stride;
  int64_t count;
  int64_t columns;
};

template <typename T>
T* Flat(const at::Tensor& t, int64_t size) {
  TORCH_CHECK(t.is_contiguous() && t.numel() >= size && t.scalar_type() == c10::CppTypeToScalarType<T>::value, "expected ", size, " contiguous elements, got ",
              t.sizes(), " of ", t.scalar_type());
  return static_cast<T*>(t.data_ptr());
}

// Calls body(T{}) with the C++ type of `type`.
template <typename Body>
void DispatchFloat(at::ScalarType type, Body&& body) {
  switch (type) {
    case at::kFloat:
      return body(float{});
    case at::kDouble:
      return body(double{});
    case at::kBFloat16:
      return body(c10::BFloat16{});
    case at::kHalf:
      return body(c10::Half{});
    default:
      TORCH_CHECK(false, "unsupported dtype ", type);
  }
}

// Rows per task, so that a task is worth its start.
inline int64_t RowGrain(int64_t columns) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, columns)); }

}  // namespace ppft::trainer::cpu
