// Dropout with the numbers of common/data/philox.h, four columns per Philox block, bit for bit those of the CPU's kernel.
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kThreads = 256;

// Philox 4x32-10 of the counter (column / 4, row, stream, domain).
__device__ __forceinline__ void Philox(uint32_t column4, uint32_t row, const DropoutNumbers& numbers, uint32_t (&out)[4]) {
  const uint4 drawn = numbers.rows != nullptr ? numbers.rows[row] : make_uint4(numbers.key[0], numbers.key[1], row, 0);
  uint32_t c0 = column4, c1 = drawn.z, c2 = numbers.stream, c3 = numbers.domain;
  uint32_t k0 = drawn.x, k1 = drawn.y;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_a = __umulhi(0xD2511F53u, c0), low_a = 0xD2511F53u * c0;
    const uint32_t high_b = __umulhi(0xCD9E8D57u, c2), low_b = 0xCD9E8D57u * c2;
    c0 = high_b ^ c1 ^ k0;
    c1 = low_b;
    c2 = high_a ^ c3 ^ k1;
    c3 = low_a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// kAdd: out += mask * scale * x, else out = mask * scale * x.
template <typename T, bool kVectors, bool kAdd>
__global__ void DropoutKernel(Rows<T> x, DropoutNumbers numbers, Rows<T> out, int64_t columns) {
  const int64_t row = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * 4;
  if (column >= columns) return;
  uint32_t random[4];
  Philox(static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), numbers, random);
  Vector<T, 4> in, result;
  const int size = static_cast<int>(min(int64_t{4}, columns - column));
  if constexpr (kVectors) {
    in = Vector<T, 4>::Load(x[row] + column);
    if constexpr (kAdd) result = Vector<T, 4>::Load(out[row] + column);
  } else {
    for (int j = 0; j < size; ++j) {
      in.at[j] = x[row][column + j];
      if constexpr (kAdd) result.at[j] = out[row][column + j];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const bool kept = random[j] >= numbers.threshold;
    const float value = __fmul_rn(ToFloat(in.at[j]), numbers.scale);
    if constexpr (kAdd) {
      if (kept) result.at[j] = FromFloat<T>(__fadd_rn(ToFloat(result.at[j]), value));
    } else {
      result.at[j] = FromFloat<T>(kept ? value : 0.0f);
    }
  }
  if constexpr (kVectors) {
    result.Store(out[row] + column);
  } else {
    for (int j = 0; j < size; ++j) out[row][column + j] = result.at[j];
  }
}

template <bool kAdd>
void Launch(Type type, int64_t rows, int64_t columns, Matrix x, DropoutNumbers numbers, Matrix out, cudaStream_t stream) {
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((columns + 4 * kThreads - 1) / (4 * kThreads)));
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    if (Aligned<T>(x, columns, 4 * sizeof(T)) && Aligned<T>(out, columns, 4 * sizeof(T))) {
      DropoutKernel<T, true, kAdd><<<grid, kThreads, 0, stream>>>(Rows<T>(x), numbers, Rows<T>(out), columns);
    } else {
      DropoutKernel<T, false, kAdd><<<grid, kThreads, 0, stream>>>(Rows<T>(x), numbers, Rows<T>(out), columns);
    }
  });
  CheckLaunch("Dropout");
}

}  // namespace

void Dropout(Type type, int64_t rows, int64_t columns, Matrix x, DropoutNumbers numbers, Matrix out, cudaStream_t stream) {
  Launch<false>(type, rows, columns, x, numbers, out, stream);
}

void DropoutBackward(Type type, int64_t rows, int64_t columns, Matrix dout, DropoutNumbers numbers, Matrix dx, cudaStream_t stream) {
  Launch<true>(type, rows, columns, dout, numbers, dx, stream);
}

}  // namespace ppft::trainer::cuda
