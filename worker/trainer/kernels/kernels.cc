#include "worker/trainer/kernels/kernels.h"

#include <ATen/ops/mm.h>

namespace ppft::trainer {

void Kernels::MatMul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  at::Tensor result = out;
  at::mm_out(result, a, b);
}

}  // namespace ppft::trainer
