#include <array>
#include <cstddef>

#include "common/data/philox.h"
#include "worker/trainer/kernels/cpu/cpu_kernels.h"
#include "worker/trainer/kernels/cpu/parallel.h"
#include "worker/trainer/kernels/cpu/rows.h"

namespace ppft::trainer::cpu {
namespace {

// body(i, kept) for each column of one row. Four columns share a Philox block with the counter (column / 4, row, stream, domain).
template <typename Body>
PPFT_INLINE void ForEachColumn(const DropoutSequence& sequence, const uint32_t* drawn, int64_t row, int64_t n, Body body) {
  const uint64_t threshold = static_cast<uint64_t>(sequence.p * 4294967296.0);  // a number below it drops
  const std::array<uint32_t, 2> key = drawn == nullptr ? sequence.key : std::array<uint32_t, 2>{drawn[4 * row], drawn[4 * row + 1]};
  const uint32_t number = drawn == nullptr ? static_cast<uint32_t>(row) : drawn[4 * row + 2];
  for (int64_t i = 0; i < n; i += 4) {
    const data::PhiloxBlock block =
        data::Philox4x32({static_cast<uint32_t>(i / 4), number, sequence.stream, static_cast<uint32_t>(data::PhiloxDomain::kDropout)}, key);
    for (int64_t j = 0; j < 4 && i + j < n; ++j) body(i + j, block[j] >= threshold);
  }
}

// DropoutSequence::rows as words; null without.
const uint32_t* DrawnRows(const DropoutSequence& sequence, int64_t rows) {
  if (!sequence.rows.defined()) return nullptr;
  TORCH_CHECK(sequence.rows.scalar_type() == at::kInt && sequence.rows.is_contiguous() && sequence.rows.numel() == 4 * rows, "dropout: rows ",
              sequence.rows.sizes(), " for ", rows, " rows");
  return reinterpret_cast<const uint32_t*>(sequence.rows.data_ptr<int32_t>());
}

}  // namespace

void Dropout(const at::Tensor& x, const DropoutSequence& sequence, const at::Tensor& out) {
  DispatchFloat(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Rows<T> in(x), o(out);
    const A scale = A(1.0 / (1.0 - sequence.p));
    const uint32_t* const drawn = DrawnRows(sequence, in.count);
    ParallelFor(0, in.count, RowGrain(in.columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        ForEachColumn(sequence, drawn, t, in.columns, [&](int64_t i, bool kept) { o[t][i] = kept ? static_cast<T>(A(in[t][i]) * scale) : T(0); });
      }
    });
  });
}

void DropoutBackward(const at::Tensor& dout, const DropoutSequence& sequence, const at::Tensor& dx) {
  DispatchFloat(dx.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Rows<T> d(dout), o(dx);
    const A scale = A(1.0 / (1.0 - sequence.p));
    const uint32_t* const drawn = DrawnRows(sequence, d.count);
    ParallelFor(0, d.count, RowGrain(d.columns), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        ForEachColumn(sequence, drawn, t, d.columns, [&](int64_t i, bool kept) {
          if (kept) o[t][i] = static_cast<T>(A(o[t][i]) + A(d[t][i]) * scale);
        });
      }
    });
  });
}

}  // namespace ppft::trainer::cpu
