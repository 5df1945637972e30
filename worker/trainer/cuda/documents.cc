#include "worker/trainer/cuda/documents.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "worker/trainer/kernels/cuda/launch.h"

namespace ppft::trainer::cuda {

Documents::Documents(std::vector<int32_t> cu_seqlens, const at::Device& device) : host_(std::move(cu_seqlens)) {
  TORCH_CHECK(host_.size() >= 2 && host_.front() == 0 && std::is_sorted(host_.begin(), host_.end()) && host_.back() > 0,
              "cu_seqlens must rise from 0 to the number of tokens");
  std::vector<int32_t> starts = {0};
  for (const int32_t end : host_) {
    if (end == starts.back()) continue;
    longest_ = std::max<int64_t>(longest_, end - starts.back());
    starts.push_back(end);
  }
  count_ = static_cast<int64_t>(starts.size()) - 1;
  capacity_ = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(count_)));
  // One upload: cu, then lengths, each from an address that 16 divides.
  const int64_t room = (capacity_ + 1 + 3) / 4 * 4;
  const at::Tensor staging = at::empty({2 * room}, at::TensorOptions(at::kInt).pinned_memory(true));
  int32_t* values = staging.data_ptr<int32_t>();
  for (int64_t i = 0; i < room; ++i) {
    values[i] = i <= count_ ? starts[i] : starts.back();
    values[room + i] = i < count_ ? starts[i + 1] - starts[i] : 0;
  }
  const at::Tensor both = staging.to(device, /*non_blocking=*/true);
  cu_ = both.narrow(0, 0, capacity_ + 1);
  lengths_ = both.narrow(0, room, capacity_);
}

const at::Tensor& Documents::Offsets(int64_t stride) {
  TORCH_CHECK(tokens() * stride <= INT32_MAX, "attention: ", tokens(), " rows ", stride, " elements apart are beyond 32-bit offsets");
  at::Tensor& offsets = offsets_[stride];
  if (!offsets.defined()) {
    offsets = at::empty({capacity_ + 1}, cu_.options());
    ScaleOffsets(cu_.data_ptr<int32_t>(), static_cast<int32_t>(capacity_ + 1), static_cast<int32_t>(stride), offsets.data_ptr<int32_t>(),
                 c10::cuda::getCurrentCUDAStream());
  }
  return offsets;
}

Documents& DocumentsCache::Get(const std::vector<int32_t>& cu_seqlens) {
  const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Documents& d) { return d.cu_seqlens() == cu_seqlens; });
  if (found != entries_.end()) {
    entries_.splice(entries_.begin(), entries_, found);
  } else {
    entries_.emplace_front(cu_seqlens, device_);
    if (entries_.size() > kEntries) entries_.pop_back();
  }
  return entries_.front();
}

}  // namespace ppft::trainer::cuda
