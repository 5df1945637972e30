#include "worker/trainer/model/activations.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

namespace ppft::trainer {

LayerActivations LayerActivations::Rows(int64_t tokens) const {
  LayerActivations rows;
  rows.hidden = hidden.narrow(0, 0, tokens);
  rows.hidden_rstd = hidden_rstd.narrow(0, 0, tokens);
  rows.qkv = qkv.narrow(0, 0, tokens);
  rows.qkv_lora = qkv_lora.narrow(0, 0, tokens);
  rows.attention = attention.narrow(0, 0, tokens);
  rows.lse = lse.narrow(1, 0, tokens);
  rows.middle = middle.narrow(0, 0, tokens);
  rows.middle_rstd = middle_rstd.narrow(0, 0, tokens);
  rows.gate_up = gate_up.narrow(0, 0, tokens);
  rows.gate_up_lora = gate_up_lora.narrow(0, 0, tokens);
  rows.down_lora = down_lora.narrow(0, 0, tokens);
  return rows;
}

ActivationPool::ActivationPool(int num_layers, const LayerSizes& sizes, model::ActivationCheckpointing checkpointing, const at::TensorOptions& compute,
                               at::ScalarType acc, int64_t least_tokens)
    : num_layers_(num_layers), sizes_(sizes), checkpointing_(checkpointing), compute_(compute), acc_(acc), least_tokens_(least_tokens) {}

std::unique_ptr<MicrobatchActivations> ActivationPool::Allocate(size_t layers, int64_t tokens, model::ActivationCheckpointing checkpointing,
                                                                bool with_hidden) const {
  auto set = std::make_unique<MicrobatchActivations>();
  set->capacity = tokens;
  const auto rows = [&](int64_t columns) {
    set->bytes += tokens * columns * static_cast<int64_t>(compute_.dtype().itemsize());
    return at::empty({tokens, columns}, compute_);
  };
  const auto acc = [&](at::IntArrayRef shape) {
    at::Tensor t = at::empty(shape, compute_.dtype(acc_));
    set->bytes += static_cast<int64_t>(t.nbytes());
    return t;
  };
  for (size_t i = 0; i < layers; ++i) {
    LayerActivations a;
    if (with_hidden) a.hidden = rows(sizes_.hidden);
    if (checkpointing == model::ActivationCheckpointing::kFull) {
      set->layers.push_back(std::move(a));
      continue;
    }
    a.hidden_rstd = acc({tokens});
    a.qkv = rows(sizes_.qkv);
    a.qkv_lora = rows(sizes_.qkv_lora);
    a.attention = rows(sizes_.attention);
    a.lse = acc({sizes_.q_heads, tokens});
    a.middle = rows(sizes_.hidden);
    a.middle_rstd = acc({tokens});
    if (checkpointing == model::ActivationCheckpointing::kNone) a.gate_up = rows(sizes_.gate_up);
    a.gate_up_lora = rows(sizes_.gate_up_lora);
    a.down_lora = rows(sizes_.down_lora);
    set->layers.push_back(std::move(a));
  }
  return set;
}

MicrobatchActivations& ActivationPool::Keep(int microbatch, int64_t tokens) {
  Release(microbatch);
  // The smallest set that fits; without one the largest makes room for a new one.
  std::sort(free_.begin(), free_.end(), [](const auto& a, const auto& b) { return a->capacity < b->capacity; });
  auto fit = std::find_if(free_.begin(), free_.end(), [tokens](const auto& set) { return set->capacity >= tokens; });
  std::unique_ptr<MicrobatchActivations> set;
  if (fit != free_.end()) {
    set = std::move(*fit);
    free_.erase(fit);
  } else {
    if (!free_.empty()) free_.pop_back();
    ++generation_;
    set = Allocate(num_layers_, std::max(tokens, least_tokens_), checkpointing_, /*with_hidden=*/true);
  }
  return *(kept_[microbatch] = std::move(set));
}

MicrobatchActivations& ActivationPool::Transient(int64_t tokens) {
  Reserve(tokens);
  at::Tensor& hidden = transient_->layers[0].hidden;
  if (!hidden.defined()) {
    hidden = at::empty({transient_->capacity, sizes_.hidden}, compute_);
    transient_->bytes += static_cast<int64_t>(hidden.nbytes());
  }
  return *transient_;
}

const LayerActivations& ActivationPool::Reserve(int64_t tokens) {
  if (transient_ == nullptr || transient_->capacity < tokens) {
    transient_.reset();
    // Part of passes with a backward only where that makes things again; a probe of few tokens alone needs little.
    const bool recomputes = checkpointing_ != model::ActivationCheckpointing::kNone;
    if (recomputes) ++generation_;
    transient_ = Allocate(1, recomputes ? std::max(tokens, least_tokens_) : tokens, model::ActivationCheckpointing::kNone, /*with_hidden=*/false);
  }
  return transient_->layers[0];
}

LayerActivations ActivationPool::Rows(const MicrobatchActivations& set, size_t layer, int64_t tokens) {
  LayerActivations rows = set.layers[std::min(layer, set.layers.size() - 1)];
  if (!rows.qkv.defined()) {
    const at::Tensor hidden = rows.hidden;
    rows = Reserve(tokens);
    rows.hidden = hidden;
  } else if (!rows.gate_up.defined()) {
    rows.gate_up = Reserve(tokens).gate_up;
  }
  return rows.Rows(tokens);
}

MicrobatchActivations* ActivationPool::FindKept(int microbatch) {
  const auto it = kept_.find(microbatch);
  return it == kept_.end() ? nullptr : it->second.get();
}

void ActivationPool::Release(int microbatch) {
  const auto it = kept_.find(microbatch);
  if (it == kept_.end()) return;
  free_.push_back(std::move(it->second));
  kept_.erase(it);
}

int64_t ActivationPool::BytesOf(const MicrobatchActivations& set) {
  int64_t bytes = set.bytes;
  for (const at::Tensor* tensor : {&set.microbatch.block, &set.head_gradient}) bytes += tensor->defined() ? static_cast<int64_t>(tensor->nbytes()) : 0;
  return bytes;
}

int64_t ActivationPool::kept_bytes() const {
  int64_t bytes = 0;
  for (const auto& [microbatch, set] : kept_) bytes += BytesOf(*set);
  return bytes;
}

int64_t ActivationPool::held_bytes() const {
  int64_t bytes = kept_bytes() + (transient_ == nullptr ? 0 : BytesOf(*transient_));
  for (const auto& set : free_) bytes += BytesOf(*set);
  return bytes;
}

void ActivationPool::EndSteps() {
  least_tokens_ = 0;
  kept_.clear();
  free_.clear();
  transient_.reset();
  ++generation_;
}

void Scratch::EndSteps() {
  least_rows_ = 0;
  buffers_ = {};
  ++generation_;
}

int64_t Scratch::held_bytes() const {
  int64_t bytes = 0;
  for (const at::Tensor& buffer : buffers_) bytes += buffer.defined() ? static_cast<int64_t>(buffer.nbytes()) : 0;
  return bytes;
}

namespace {

// The role whose buffer `role` takes where buffers are shared. In each of the three (forward through a layer, the head, backward through a layer) the roles of
// one buffer follow one another: the input of a linear is dead when SwiGLU's output is made, that one when the layer ends; a block's output is read before
// the rows of the next q k v are made.
Scratch::Role OwnerOf(Scratch::Role role) {
  switch (role) {
    case Scratch::kNormed:
    case Scratch::kGradient:
    case Scratch::kHeadDelta:
    case Scratch::kLogits:
      return Scratch::kGated;
    case Scratch::kQkvGradient:
    case Scratch::kHeadNormed:
      return Scratch::kBlockOut;
    case Scratch::kHeadHidden:
      return Scratch::kHiddenGradient;
    default:
      return role;
  }
}

}  // namespace

at::Tensor Scratch::Get(Role role, int64_t rows, int64_t columns) {
  at::Tensor& buffer = buffers_[shared_ ? OwnerOf(role) : role];
  if (!buffer.defined() || buffer.numel() < rows * columns) {
    buffer.reset();
    buffer = at::empty({(role == kLogits ? rows : std::max(rows, least_rows_)) * columns}, compute_);
    ++generation_;
  }
  return buffer.narrow(0, 0, rows * columns).view({rows, columns});
}

}  // namespace ppft::trainer
