// The documents of a micro-batch as the attention kernels read them: one table of int32 words that is uploaded with the micro-batch.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "worker/trainer/kernels/kernels.h"

namespace ppft::trainer::cuda {

// What a launch depends on. Rounded up, so that a few plans and captured passes serve all packings.
struct DocumentsShape {
  // `cu_seqlens` rises from 0 to the number of tokens; empty documents are left out.
  explicit DocumentsShape(const std::vector<int32_t>& cu_seqlens);

  int64_t tokens = 0;
  int64_t capacity = 0;  // the number of documents rounded up to a power of two
  int64_t longest = 0;   // tokens of a document, likewise, at least 128
  int64_t uniform = 0;   // tokens of each document where all have the same number, a multiple of 256; else 0
};

// The distance of two rows of attention's output that its kernels write: `out_stride` where vectors of 16 bytes suit it, else dense rows, which are copied.
int64_t RowStride(const HeadLayout& heads, int64_t out_stride);

// The host's words. Past the last document the offsets stay at the end and the lengths are 0.
std::vector<int32_t> DocumentWords(const std::vector<int32_t>& cu_seqlens, const HeadLayout& heads, int64_t out_stride);

// The same words on the device.
class DocumentTable {
 public:
  // Uploads them where `documents` brings no table.
  DocumentTable(const Documents& documents, const HeadLayout& heads, int64_t out_stride, const at::Device& device);

  const DocumentsShape& shape() const { return shape_; }
  at::Tensor cu() const { return words_.narrow(0, 0, shape_.capacity + 1); }  // [capacity + 1] int32
  int32_t* lengths() const { return Row(1); }                                 // [capacity]
  // [capacity + 1]: the first element of each document in rows of q, of k and v, of attention's output (RowStride apart), of log-sum-exp.
  int32_t* q_offsets() const { return Row(2); }
  int32_t* kv_offsets() const { return Row(3); }
  int32_t* out_offsets() const { return Row(4); }
  int32_t* stats_offsets() const { return Row(5); }

 private:
  int32_t* Row(int64_t index) const;

  const DocumentsShape shape_;
  at::Tensor words_;
};

}  // namespace ppft::trainer::cuda
