// fp32 products by oneDNN: it generates its code for the CPU that it finds, where MKL keeps AVX2 on other makers' AVX-512 machines (measured 2.2x slower).
// Its results depend neither on alignment nor on the number of threads. ATen offers it for dense fp32 only as inductor's linear operator.
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "worker/trainer/kernels/cpu/cpu_kernels.h"

namespace ppft::trainer::cpu {
namespace {

// x [M, K], weight [N, K] of any strides -> new tensor x weight^T.
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view, c10::List<std::optional<at::Scalar>>,
                          std::optional<std::string_view>);

const std::optional<c10::TypedOperatorHandle<Linear>>& OneDnnLinear() {
  static const std::optional<c10::TypedOperatorHandle<Linear>> op = [] {
    const std::optional<c10::OperatorHandle> found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return found ? std::make_optional(found->typed<Linear>()) : std::nullopt;
  }();
  return op;
}

// The generated code belongs to one number of rows. Blocks of few sizes keep a ragged micro-batch from paying for its own, and a block's result is copied
// from cache into the caller's buffer.
constexpr int64_t kMaxBlock = 512;
constexpr int64_t kMinBlock = 16;

}  // namespace

void MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const int64_t rows = a.size(0);
  int64_t row = 0;
  if (a.scalar_type() == at::kFloat && OneDnnLinear()) {
    const at::Tensor weight = b.t();
    for (int64_t block = kMaxBlock; block >= kMinBlock; block /= 2) {
      for (; rows - row >= block; row += block) {
        out.narrow(0, row, block)
            .copy_(OneDnnLinear()->call(a.narrow(0, row, block), weight, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), ""));
      }
    }
  }
  if (row < rows) {
    at::Tensor rest = out.narrow(0, row, rows - row);
    at::mm_out(rest, a.narrow(0, row, rows - row), b);
  }
}

}  // namespace ppft::trainer::cpu
