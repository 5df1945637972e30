// RMSNorm, RoPE, SwiGLU.
#include "worker/trainer/kernels/cpu/cpu_kernels.h"
#include "worker/trainer/kernels/cpu/parallel.h"
#include "worker/trainer/kernels/cpu/rows.h"

namespace ppft::trainer::cpu {
namespace {

template <typename T>
PPFT_CPU_CLONES void AddRow(const T* x, const T* delta, T* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = static_cast<T>(Acc<T>(x[i]) + Acc<T>(delta[i]));
}

template <typename T>
PPFT_CPU_CLONES Acc<T> SquareSum(const T* x, int64_t n) {
  using A = Acc<T>;
  return LaneSum<A>(
      n, [x](int64_t i) __attribute__((always_inline)) { return A(x[i]) * A(x[i]); });
}

template <typename T>
PPFT_CPU_CLONES void NormRow(const T* x, Acc<T> rstd, const T* weight, T* __restrict normed, int64_t n) {
  using A = Acc<T>;
  for (int64_t i = 0; i < n; ++i) normed[i] = static_cast<T>(A(x[i]) * rstd * A(weight[i]));
}

template <typename T>
PPFT_CPU_CLONES void NormBackwardRow(const T* dnormed, const T* x, Acc<T> rstd, const T* weight, T* __restrict dx, int64_t n) {
  using A = Acc<T>;
  const A mean = LaneSum<A>(
                     n, [=](int64_t i) __attribute__((always_inline)) { return A(dnormed[i]) * A(weight[i]) * A(x[i]); }) *
                 rstd / A(n);
  for (int64_t i = 0; i < n; ++i) dx[i] = static_cast<T>(A(dx[i]) + rstd * (A(dnormed[i]) * A(weight[i]) - A(x[i]) * rstd * mean));
}

template <typename T>
PPFT_CPU_CLONES void RopeHeads(T* __restrict row, int64_t heads, int64_t half, const Acc<T>* cos, const Acc<T>* sin, Acc<T> sign) {
  using A = Acc<T>;
  for (int64_t h = 0; h < heads; ++h) {
    T* first = row + h * 2 * half;
    T* second = first + half;
    for (int64_t i = 0; i < half; ++i) {
      const A a = A(first[i]), b = A(second[i]), s = sign * sin[i];
      first[i] = static_cast<T>(a * cos[i] - b * s);
      second[i] = static_cast<T>(b * cos[i] + a * s);
    }
  }
}

template <typename T>
PPFT_CPU_CLONES void SwiGluRow(const T* gate, const T* up, T* __restrict out, int64_t n) {
  using A = Acc<T>;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(A(gate[i]) * Sigmoid(A(gate[i])) * A(up[i]));
}

// dgate and dup may be gate and up.
template <typename T>
PPFT_CPU_CLONES void SwiGluBackwardRow(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  using A = Acc<T>;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const A g = A(gate[i]), u = A(up[i]), d = A(dout[i]), s = Sigmoid(g);
    dgate[i] = static_cast<T>(d * u * s * (A(1) + g * (A(1) - s)));
    dup[i] = static_cast<T>(d * g * s);
  }
}

}  // namespace

void AddRmsNorm(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps, const at::Tensor& sum, const at::Tensor& normed,
                const at::Tensor& rstd) {
  DispatchFloat(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Rows<T> xs(x), deltas(delta.defined() ? delta : x), sums(delta.defined() ? sum : x), out(normed);
    const int64_t n = xs.columns;
    const T* w = Flat<T>(weight, n);
    A* r = Flat<A>(rstd, xs.count);
    ParallelFor(0, xs.count, RowGrain(n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (delta.defined()) AddRow<T>(xs[t], deltas[t], sums[t], n);
        r[t] = A(1) / std::sqrt(SquareSum<T>(sums[t], n) / A(n) + A(eps));
        NormRow<T>(sums[t], r[t], w, out[t], n);
      }
    });
  });
}

void ApplyRmsNorm(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& normed) {
  DispatchFloat(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> xs(x), out(normed);
    const int64_t n = xs.columns;
    const T* w = Flat<T>(weight, n);
    const Acc<T>* r = Flat<Acc<T>>(rstd, xs.count);
    ParallelFor(0, xs.count, RowGrain(n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) NormRow<T>(xs[t], r[t], w, out[t], n);
    });
  });
}

void RmsNormBackward(const at::Tensor& dnormed, const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dx) {
  DispatchFloat(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> dn(dnormed), xs(x), out(dx);
    const int64_t n = xs.columns;
    const T* w = Flat<T>(weight, n);
    const Acc<T>* r = Flat<Acc<T>>(rstd, xs.count);
    ParallelFor(0, xs.count, RowGrain(n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) NormBackwardRow<T>(dn[t], xs[t], r[t], w, out[t], n);
    });
  });
}

void Rope(const at::Tensor& qkv, const HeadLayout& heads, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position, bool inverse) {
  DispatchFloat(qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Rows<T> rows(qkv);
    const Rows<A> c(cos), s(sin);
    const int32_t* at = Flat<int32_t>(position, rows.count);
    const int64_t half = heads.head_dim / 2;
    TORCH_CHECK(rows.columns == heads.row_size() && c.columns == half && s.columns == half, "rope: qkv has ", rows.columns, " columns");
    ParallelFor(0, rows.count, RowGrain(rows.columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        TORCH_CHECK(at[t] >= 0 && at[t] < c.count, "rope: position ", at[t], " is beyond the table of ", c.count);
        RopeHeads<T>(rows[t], heads.q_heads + heads.kv_heads, half, c[at[t]], s[at[t]], inverse ? A(-1) : A(1));
      }
    });
  });
}

void SwiGlu(const at::Tensor& gate_up, const at::Tensor& out) {
  DispatchFloat(gate_up.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> in(gate_up), o(out);
    const int64_t n = o.columns;
    TORCH_CHECK(in.columns == 2 * n, "swiglu: ", in.columns, " columns for ", n);
    ParallelFor(0, in.count, RowGrain(n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) SwiGluRow<T>(in[t], in[t] + n, o[t], n);
    });
  });
}

void SwiGluBackward(const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& dgate_up) {
  DispatchFloat(gate_up.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> d(dout), in(gate_up), o(dgate_up);
    const int64_t n = d.columns;
    TORCH_CHECK(in.columns == 2 * n && o.columns == 2 * n, "swiglu backward: ", in.columns, " columns for ", n);
    ParallelFor(0, in.count, RowGrain(n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) SwiGluBackwardRow<T>(d[t], in[t], in[t] + n, o[t], o[t] + n, n);
    });
  });
}

}  // namespace ppft::trainer::cpu
