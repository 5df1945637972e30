// From tensors to what launch.h takes. Every function checks the contract of ../kernels.h and throws c10::Error.
#pragma once

#include <ATen/core/Tensor.h>

#include "worker/trainer/kernels/cuda/launch.h"

namespace ppft::trainer::cuda {

inline Type TypeOf(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kHalf;
    default:
      TORCH_CHECK(false, "the CUDA kernels compute in fp32, bf16 or fp16, not ", t.scalar_type());
  }
}

inline Matrix MatrixOf(const at::Tensor& t, at::ScalarType type, int64_t rows, int64_t columns) {
  TORCH_CHECK(t.is_cuda() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == type && (t.stride(1) == 1 || columns <= 1),
              "expected [", rows, ", ", columns, "] of ", type, " on the device with its columns side by side, got ", t.sizes(), " of ", t.scalar_type(),
              " on ", t.device());
  return {t.data_ptr(), t.stride(0)};
}

template <typename T>
T* Flat(const at::Tensor& t, int64_t size) {
  TORCH_CHECK(t.is_cuda() && t.is_contiguous() && t.numel() >= size && t.scalar_type() == c10::CppTypeToScalarType<T>::value, "expected ", size,
              " contiguous elements of ", c10::CppTypeToScalarType<T>::value, " on the device, got ", t.sizes(), " of ", t.scalar_type(), " on ", t.device());
  return static_cast<T*>(t.data_ptr());
}

}  // namespace ppft::trainer::cuda
