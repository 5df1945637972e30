// Attention on a CUDA device: cuDNN where it serves, ATen's flash attention (2307.08691) where it does not and in deterministic mode, plain products in fp32.
//
// Thread: one at a time, on its current stream. Errors: exceptions, as plugin.h says.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "worker/trainer/cuda/cudnn_attention.h"
#include "worker/trainer/cuda/documents.h"
#include "worker/trainer/kernels/kernels.h"

namespace ppft::trainer::cuda {

enum class AttentionPath { kCudnn, kFlash, kProducts };

class Attention {
 public:
  explicit Attention(const at::Device& device);

  // Contracts: Kernels. lse's memory is laid out as the path likes it: Backward must find the mode (deterministic or not) of Forward.
  void Forward(const QkvParts& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse);
  void Backward(const at::Tensor& dout, const QkvParts& qkv, const HeadLayout& heads, const Documents& documents, const at::Tensor& out, const at::Tensor& lse,
                const QkvParts& dqkv, const at::Tensor& room);

  // Loads the libraries of the path that documents of 64-column heads in bf16 take.
  void Load();

 private:
  // What cuDNN's plan is made for: the same for both passes.
  AttentionShape ShapeOf(at::ScalarType type, const HeadLayout& heads, const DocumentsShape& documents, int64_t out_stride);
  AttentionPath PathOf(at::ScalarType type, const HeadLayout& heads, const DocumentsShape& documents, int64_t out_stride);

  const at::Device device_;
  bool hopper_or_later_ = false;
  std::unique_ptr<CudnnAttention> cudnn_;
  std::set<std::string> reported_;  // why cuDNN did not serve, each logged once
  at::Tensor rng_state_;            // flash attention's, unused without dropout
};

}  // namespace ppft::trainer::cuda
