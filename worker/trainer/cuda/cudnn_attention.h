// Causal attention over documents of different lengths by cuDNN (through cudnn-frontend): ragged offsets into the packed rows, plans built once per shape.
// Takes bf16 and fp16 on GPUs of compute capability 9.0 and later. Its backward pass adds in no fixed order: not for bit-equal runs.
//
// Thread: one at a time, on its current stream. Errors: exceptions, as plugin.h says.
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

// What a plan depends on. uniform: all documents have the same length, and the plan knows it; the others read offsets and lengths from the table.
struct AttentionShape {
  AttentionShape(at::ScalarType type, const HeadLayout& heads, const DocumentsShape& documents, int64_t out_stride, bool uniform);
  auto Key() const { return std::tie(type, q_heads, kv_heads, head_dim, documents, longest, tokens, out_stride, uniform); }
  friend bool operator<(const AttentionShape& a, const AttentionShape& b) { return a.Key() < b.Key(); }

  at::ScalarType type;
  int64_t q_heads, kv_heads, head_dim;
  int64_t documents;  // capacity; uniform: their number
  int64_t longest;    // tokens of a document, at most
  int64_t tokens;     // of the micro-batch, at most
  int64_t out_stride;
  bool uniform;
};

class CudnnAttention {
 public:
  CudnnAttention();
  ~CudnnAttention();
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;

  // Whether cuDNN serves forward and backward of this shape; builds the plans at the first call (0.1 to 2 s). Otherwise `reason` (if not null) says why.
  bool Serves(const AttentionShape& shape, std::string* reason);

  // q, k, v and their gradients are contiguous, rows of out and dout out_stride apart; addresses and strides are multiples of 16 bytes. lse: room for
  // tokens * q_heads fp32, laid out as the plan likes it. The table was made with this out_stride.
  void Forward(const AttentionShape& shape, const DocumentTable& documents, const QkvParts& qkv, const at::Tensor& out, float* lse);
  void Backward(const AttentionShape& shape, const DocumentTable& documents, const at::Tensor& dout, const QkvParts& qkv, const at::Tensor& out,
                const float* lse, const QkvParts& dqkv, const at::Tensor& room);

 private:
  struct Plans;
  Plans& Find(const AttentionShape& shape);

  cudnnHandle_t handle_ = nullptr;
  std::map<AttentionShape, std::unique_ptr<Plans>> plans_;
};

}  // namespace ppft::trainer::cuda
