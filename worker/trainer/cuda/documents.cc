#include "worker/trainer/cuda/documents.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>

namespace ppft::trainer::cuda {
namespace {

constexpr int64_t kRows = 6;
constexpr int64_t kLeastLongest = 128;
constexpr int64_t kUniformMultiple = 256;  // there are plans for few lengths only

// Words of a row: it begins at an address that 16 bytes divide.
int64_t RowWords(int64_t capacity) { return (capacity + 1 + 3) / 4 * 4; }

}  // namespace

DocumentsShape::DocumentsShape(const std::vector<int32_t>& cu_seqlens) {
  TORCH_CHECK(cu_seqlens.size() >= 2 && cu_seqlens.front() == 0 && std::is_sorted(cu_seqlens.begin(), cu_seqlens.end()) && cu_seqlens.back() > 0,
              "cu_seqlens must rise from 0 to the number of tokens");
  uint64_t count = 0, most = 0;
  for (size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
    const uint64_t length = static_cast<uint64_t>(cu_seqlens[d + 1] - cu_seqlens[d]);
    count += length > 0 ? 1 : 0;
    most = std::max(most, length);
  }
  tokens = cu_seqlens.back();
  if (count * most == static_cast<uint64_t>(tokens) && tokens % (static_cast<int64_t>(count) * kUniformMultiple) == 0) uniform = static_cast<int64_t>(most);
  capacity = static_cast<int64_t>(std::bit_ceil(count));
  longest = std::max(kLeastLongest, static_cast<int64_t>(std::bit_ceil(most)));
}

int64_t RowStride(const HeadLayout& heads, int64_t out_stride) { return out_stride % 8 == 0 ? out_stride : heads.q_size(); }

std::vector<int32_t> DocumentWords(const std::vector<int32_t>& cu_seqlens, const HeadLayout& heads, int64_t out_stride) {
  const DocumentsShape shape(cu_seqlens);
  out_stride = RowStride(heads, out_stride);
  TORCH_CHECK(shape.tokens * std::max(out_stride, heads.q_size()) <= INT32_MAX, "attention: ", shape.tokens, " rows ", std::max(out_stride, heads.q_size()),
              " elements apart are beyond 32-bit offsets");
  const int64_t row = RowWords(shape.capacity);
  std::vector<int32_t> words(static_cast<size_t>(kRows * row), 0);
  const int64_t factors[kRows] = {1, 0, heads.q_size(), heads.kv_size(), out_stride, heads.q_heads};
  size_t at = 0;
  int64_t document = 0;
  for (int64_t i = 0; i < row; ++i) {
    // The next document that is not empty.
    while (at + 1 < cu_seqlens.size() && cu_seqlens[at + 1] == cu_seqlens[at]) ++at;
    const int32_t begin = cu_seqlens[std::min(at, cu_seqlens.size() - 1)];
    for (int64_t r = 0; r < kRows; ++r) words[static_cast<size_t>(r * row + i)] = static_cast<int32_t>(begin * factors[r]);
    if (at + 1 < cu_seqlens.size()) {
      words[static_cast<size_t>(row + i)] = cu_seqlens[at + 1] - begin;
      ++document;
      ++at;
    }
  }
  TORCH_CHECK(document <= shape.capacity, "attention: ", document, " documents in a table for ", shape.capacity);
  return words;
}

DocumentTable::DocumentTable(const Documents& documents, const HeadLayout& heads, int64_t out_stride, const at::Device& device)
    : shape_(documents.cu_seqlens), words_(documents.table) {
  const int64_t size = kRows * RowWords(shape_.capacity);
  if (!words_.defined()) {
    const std::vector<int32_t> words = DocumentWords(documents.cu_seqlens, heads, out_stride);
    const at::Tensor staging = at::empty({size}, at::TensorOptions(at::kInt).pinned_memory(true));
    std::copy(words.begin(), words.end(), staging.data_ptr<int32_t>());
    words_ = staging.to(device, /*non_blocking=*/true);
  }
  TORCH_CHECK(words_.is_cuda() && words_.scalar_type() == at::kInt && words_.is_contiguous() && words_.numel() >= size, "attention: a table of ",
              words_.sizes(), " for ", shape_.capacity, " documents");
}

int32_t* DocumentTable::Row(int64_t index) const { return words_.data_ptr<int32_t>() + index * RowWords(shape_.capacity); }

}  // namespace ppft::trainer::cuda
