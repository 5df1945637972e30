// Finite differences in fp64, to check an explicit backward pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <functional>

namespace ppft::trainer {

// d f / d x by central differences, x: fp64 of any strides; f reads x's memory.
inline at::Tensor NumericGradient(const at::Tensor& x, const std::function<double()>& f, double step = 1e-5) {
  const at::Tensor gradient = at::empty(x.sizes(), x.options());
  at::Tensor flat = gradient.view({-1});
  for (int64_t i = 0; i < x.numel(); ++i) {
    at::Tensor element = x;
    int64_t rest = i;
    for (int64_t d = x.dim() - 1; d >= 0; --d) {
      element = element.select(d, rest % x.size(d));
      rest /= x.size(d);
    }
    double& value = *static_cast<double*>(element.data_ptr());
    const double saved = value;
    value = saved + step;
    const double up = f();
    value = saved - step;
    const double down = f();
    value = saved;
    static_cast<double*>(flat.data_ptr())[i] = (up - down) / (2 * step);
  }
  return gradient;
}

// Largest difference over the larger of 1e-3 and the largest expected value.
inline double RelativeError(const at::Tensor& actual, const at::Tensor& expected) {
  const double scale = std::max(1e-3, expected.to(at::kDouble).abs().max().item<double>());
  return actual.to(at::kDouble).sub(expected.to(at::kDouble)).abs().max().item<double>() / scale;
}

}  // namespace ppft::trainer
