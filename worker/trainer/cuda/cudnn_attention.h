// Causal attention over documents of different lengths by cuDNN (through cudnn-frontend): ragged offsets into the packed rows, plans built once per shape.
// Takes bf16 and fp16 on GPUs of compute capability 9.0 and later. Its backward pass adds in no fixed order: not for bit-equal runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <cudnn.h>

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "worker/trainer/cuda/documents.h"
#include "worker/trainer/kernels/kernels.h"

namespace ppft::trainer::cuda {

// What a plan depends on. Lengths are rounded up, so that a few plans serve all packings.
struct AttentionShape {
  AttentionShape(at::ScalarType type, const HeadLayout& heads, const Documents& documents, int64_t qkv_stride, int64_t out_stride);
  auto Key() const { return std::tie(type, q_heads, kv_heads, head_dim, documents, longest, tokens, qkv_stride, out_stride); }
  friend bool operator<(const AttentionShape& a, const AttentionShape& b) { return a.Key() < b.Key(); }

  at::ScalarType type;
  int64_t q_heads, kv_heads, head_dim;
  int64_t documents;  // capacity
  int64_t longest;    // tokens of a document, at most
  int64_t tokens;     // of the micro-batch, at most
  int64_t qkv_stride, out_stride;
};

class CudnnAttention {
 public:
  CudnnAttention();
  ~CudnnAttention();
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;

  // Whether cuDNN serves forward and backward of this shape; builds the plans at the first call (0.1 to 2 s). Otherwise `reason` (if not null) says why.
  bool Serves(const AttentionShape& shape, std::string* reason);

  // Addresses and row strides must be multiples of 16 bytes. lse: room for tokens * q_heads fp32, laid out by token.
  void Forward(const AttentionShape& shape, const HeadLayout& heads, Documents& documents, const at::Tensor& qkv, const at::Tensor& out, float* lse);
  // Rows at any stride, dense ones best: the others are copied. dq, dk, dv: contiguous [tokens, heads * head_dim].
  void Backward(const AttentionShape& shape, const HeadLayout& heads, Documents& documents, const at::Tensor& dout, const at::Tensor& qkv,
                const at::Tensor& out, const float* lse, const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv);

 private:
  struct Plans;
  Plans& Find(const AttentionShape& shape);

  cudnnHandle_t handle_ = nullptr;
  std::map<AttentionShape, std::unique_ptr<Plans>> plans_;
};

}  // namespace ppft::trainer::cuda
