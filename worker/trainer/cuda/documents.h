// The documents of a micro-batch on the device: cu_seqlens as the attention kernels read them, uploaded once for all layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <list>
#include <map>
#include <vector>

namespace ppft::trainer::cuda {

class Documents {
 public:
  // `cu_seqlens` rises from 0 to the number of tokens; empty documents are left out. The upload is asynchronous on the current stream.
  Documents(std::vector<int32_t> cu_seqlens, const at::Device& device);

  const std::vector<int32_t>& cu_seqlens() const { return host_; }  // as given
  int64_t tokens() const { return host_.back(); }
  int64_t count() const { return count_; }
  int64_t longest() const { return longest_; }
  // count() rounded up to a power of two: the documents that the device tensors have room for.
  int64_t capacity() const { return capacity_; }

  const at::Tensor& cu() const { return cu_; }            // [capacity + 1] int32; past the last document the number of tokens
  const at::Tensor& lengths() const { return lengths_; }  // [capacity] int32; past the last document 0
  // [capacity + 1] int32: cu * stride, the first element of each document in rows `stride` apart. Made at the first call for a stride.
  const at::Tensor& Offsets(int64_t stride);

 private:
  std::vector<int32_t> host_;
  int64_t count_ = 0;
  int64_t longest_ = 0;
  int64_t capacity_ = 0;
  at::Tensor cu_, lengths_;
  std::map<int64_t, at::Tensor> offsets_;
};

// The last micro-batches' documents, found again by content. Thread: one at a time.
class DocumentsCache {
 public:
  explicit DocumentsCache(const at::Device& device) : device_(device) {}
  // Valid until the next call.
  Documents& Get(const std::vector<int32_t>& cu_seqlens);

 private:
  static constexpr size_t kEntries = 64;  // at least the micro-batches in flight on a stage
  const at::Device device_;
  std::list<Documents> entries_;  // most recently used first
};

}  // namespace ppft::trainer::cuda
