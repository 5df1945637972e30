#include "worker/trainer/model/microbatch_tensors.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/data/philox.h"

namespace ppft::trainer {
namespace {

constexpr int64_t kAlignment = 256;
constexpr uint64_t kLeastLongest = 128;
constexpr int64_t kDropoutWords = 4;  // of a row

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where the parts of a block begin. The table of the documents is last: its length varies.
struct Offsets {
  Offsets(int64_t capacity, bool dropout) {
    int64_t end = 0;
    const auto place = [&](int64_t bytes) {
      const int64_t begin = end;
      end += RoundUp(bytes, kAlignment);
      return begin;
    };
    loss_weight = place(4);
    position = place(capacity * 4);
    target_of = place(capacity * 4);
    ids = place(capacity * 8);
    target_rows = place(capacity * 8);
    target_ids = place(capacity * 8);
    dropout_rows = place(dropout ? capacity * kDropoutWords * 4 : 0);
    table = end;
  }

  int64_t loss_weight, position, target_of, ids, target_rows, target_ids, dropout_rows, table;
};

// `words`: kDropoutWords for each of `rows` rows; those behind the input's tokens are padding.
void FillDropoutRows(uint64_t seed, const MicrobatchInput& input, int64_t rows, int32_t* words) {
  const uint64_t step = static_cast<uint64_t>(input.step);
  const std::vector<MergedMicrobatch> alone = {{input.microbatch, input.cu_seqlens.back()}};
  int64_t row = 0;
  for (const MergedMicrobatch& merged : input.merged.empty() ? alone : input.merged) {
    const data::PhiloxBlock key = data::Philox4x32({static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), static_cast<uint32_t>(merged.microbatch),
                                                    static_cast<uint32_t>(data::PhiloxDomain::kDropout)},
                                                   {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    for (int64_t i = 0; i < merged.tokens; ++i, ++row) {
      const int32_t drawn[kDropoutWords] = {static_cast<int32_t>(key[0]), static_cast<int32_t>(key[1]), static_cast<int32_t>(i), 0};
      std::memcpy(words + row * kDropoutWords, drawn, sizeof(drawn));
    }
  }
  std::fill(words + row * kDropoutWords, words + rows * kDropoutWords, 0);
}

int64_t RealTargets(const MicrobatchInput& input) { return input.target_rows.defined() ? input.target_rows.numel() : 0; }

// What the passes depend on besides the numbers themselves.
void SetSizes(const MicrobatchLayout& layout, const MicrobatchInput& input, MicrobatchTensors& t) {
  t.real_tokens = input.cu_seqlens.back();
  t.tokens = RoundUp(t.real_tokens, layout.multiple);
  t.training = input.training;
  t.documents.cu_seqlens = input.cu_seqlens;
  if (t.tokens > t.real_tokens) t.documents.cu_seqlens.push_back(static_cast<int32_t>(t.tokens));
  t.loss_weight = input.loss_weight;
  const std::vector<int32_t>& cu = t.documents.cu_seqlens;
  uint64_t documents = 0, longest = 0;
  for (size_t d = 0; d + 1 < cu.size(); ++d) {
    documents += cu[d + 1] > cu[d] ? 1 : 0;
    longest = std::max(longest, static_cast<uint64_t>(cu[d + 1] - cu[d]));
  }
  t.document_capacity = static_cast<int64_t>(std::bit_ceil(documents));
  t.uniform = documents * longest == static_cast<uint64_t>(t.tokens) ? static_cast<int64_t>(longest) : 0;
  t.longest = static_cast<int64_t>(std::bit_ceil(std::max(longest, kLeastLongest)));
  t.targets = RoundUp(RealTargets(input), layout.multiple);
}

// The numbers of a block, but for the table.
void FillNumbers(const MicrobatchLayout& layout, const MicrobatchInput& input, const MicrobatchTensors& t, const Offsets& at, char* bytes) {
  const auto words = [&](int64_t offset) { return reinterpret_cast<int32_t*>(bytes + offset); };
  const auto longs = [&](int64_t offset) { return reinterpret_cast<int64_t*>(bytes + offset); };
  const std::vector<int32_t>& cu = t.documents.cu_seqlens;
  const int64_t real_targets = RealTargets(input);
  const float weight = static_cast<float>(input.loss_weight);
  std::memcpy(words(at.loss_weight), &weight, 4);
  if (layout.dropout && input.training) FillDropoutRows(layout.seed, input, t.tokens, words(at.dropout_rows));
  for (size_t d = 0; d + 1 < cu.size(); ++d) {
    for (int32_t row = cu[d]; row < cu[d + 1]; ++row) words(at.position)[row] = row - cu[d];
  }
  if (input.ids.defined()) std::memcpy(longs(at.ids), input.ids.data_ptr(), input.ids.nbytes());
  if (input.target_rows.defined()) {
    const int64_t* const rows = input.target_rows.data_ptr<int64_t>();
    const int64_t* const ids = input.target_ids.data_ptr<int64_t>();
    std::fill_n(words(at.target_of), t.tokens, -1);
    for (int64_t i = 0; i < t.targets; ++i) {
      longs(at.target_rows)[i] = i < real_targets ? rows[i] : 0;
      longs(at.target_ids)[i] = i < real_targets ? ids[i] : -1;
      if (i < real_targets) words(at.target_of)[rows[i]] = static_cast<int32_t>(i);
    }
  }
}

// [count] of `type` at a byte of the block.
at::Tensor ViewOf(const at::Tensor& block, int64_t offset, int64_t count, at::ScalarType type) {
  return block.narrow(0, offset, count * static_cast<int64_t>(c10::elementSize(type))).view(type);
}

}  // namespace

int64_t PaddedTokens(const MicrobatchLayout& layout, const MicrobatchInput& input) { return RoundUp(input.cu_seqlens.back(), layout.multiple); }

bool FillMicrobatch(const MicrobatchLayout& layout, const Kernels& kernels, const MicrobatchInput& input, int64_t capacity, MicrobatchTensors* tensors) {
  MicrobatchTensors& t = *tensors;
  SetSizes(layout, input, t);
  const std::vector<int32_t> table = kernels.DocumentTable(t.documents.cu_seqlens, layout.heads, layout.out_stride);
  const int64_t table_bytes = static_cast<int64_t>(table.size() * sizeof(int32_t));
  capacity = std::max({capacity, t.tokens, t.targets});
  const Offsets at(capacity, layout.dropout);
  const bool on_device = !layout.device.is_cpu();
  const at::Tensor staging = at::empty({at.table + table_bytes}, at::TensorOptions(at::kChar).pinned_memory(on_device));
  char* const bytes = static_cast<char*>(staging.data_ptr());
  FillNumbers(layout, input, t, at, bytes);
  if (table_bytes > 0) std::memcpy(bytes + at.table, table.data(), static_cast<size_t>(table_bytes));

  bool moved = false;
  if (!on_device) {
    t.block = staging;
  } else {
    // Room for as many documents as tokens would be rare to need; what the table needs at least is doubled.
    if (!t.block.defined() || t.block.numel() < staging.numel()) {
      t.block = at::empty({at.table + 2 * table_bytes}, at::TensorOptions(at::kChar).device(layout.device));
      moved = true;
    }
    t.block.narrow(0, 0, staging.numel()).copy_(staging, /*non_blocking=*/true);
    t.loss_weight.device = ViewOf(t.block, at.loss_weight, 1, at::kFloat);
    t.documents.table = ViewOf(t.block, at.table, static_cast<int64_t>(table.size()), at::kInt);
  }
  t.position = ViewOf(t.block, at.position, t.tokens, at::kInt);
  t.dropout_rows =
      layout.dropout && input.training ? ViewOf(t.block, at.dropout_rows, t.tokens * kDropoutWords, at::kInt).view({t.tokens, kDropoutWords}) : at::Tensor();
  t.ids = input.ids.defined() ? ViewOf(t.block, at.ids, t.real_tokens, at::kLong) : at::Tensor();
  const bool has_targets = input.target_rows.defined();
  t.target_rows = has_targets ? ViewOf(t.block, at.target_rows, t.targets, at::kLong) : at::Tensor();
  t.target_ids = has_targets ? ViewOf(t.block, at.target_ids, t.targets, at::kLong) : at::Tensor();
  t.target_of = has_targets ? ViewOf(t.block, at.target_of, t.tokens, at::kInt) : at::Tensor();
  return moved;
}

}  // namespace ppft::trainer
