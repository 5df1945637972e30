#include "worker/trainer/model/decoder_layer.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/data/philox.h"
#include "common/model/inventory.h"

namespace ppft::trainer {
namespace {

std::vector<LoraModule> StackOf(const model::ModelConfig& config, const LoraOptions& lora, int64_t layer, std::initializer_list<int> indices) {
  std::vector<LoraModule> stack;
  for (const int index : indices) {
    const std::string& name = model::TargetModules()[index];
    LoraModule module;
    module.name = absl::StrCat("model.layers.", layer, ".", model::ModulePath(name));
    module.index = index;
    module.out = model::ShapeOfModule(config, name).out;
    module.adapted = std::find(lora.target_modules.begin(), lora.target_modules.end(), name) != lora.target_modules.end();
    stack.push_back(std::move(module));
  }
  return stack;
}

}  // namespace

absl::Status LoadBaseTensor(const TensorSource& source, const std::string& name, const at::Tensor& into) {
  PPFT_ASSIGN_OR_RETURN(const at::Tensor tensor, source(name));
  if (tensor.sizes() != into.sizes()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has the shape ", model::ShapeText(tensor.sizes().vec()), ", but config.json asks for ", model::ShapeText(into.sizes().vec())));
  }
  into.copy_(tensor);
  return absl::OkStatus();
}

DecoderLayer::DecoderLayer(const model::ModelConfig& config, const StageOptions& options, int64_t layer, const at::TensorOptions& compute, Kernels& kernels)
    : config_(config),
      lora_(options.lora),
      layer_(layer),
      heads_{config.num_attention_heads, config.num_key_value_heads, config.head_dim},
      kernels_(kernels),
      qkv_(config.hidden_size, lora_.r, lora_.scale, StackOf(config, lora_, layer, {0, 1, 2}), compute, options.weights == WeightHome::kResident, kernels),
      o_(config.query_size(), lora_.r, lora_.scale, StackOf(config, lora_, layer, {3}), compute, options.weights == WeightHome::kResident, kernels),
      gate_up_(config.hidden_size, lora_.r, lora_.scale, StackOf(config, lora_, layer, {4, 5}), compute, options.weights == WeightHome::kResident, kernels),
      down_(config.intermediate_size, lora_.r, lora_.scale, StackOf(config, lora_, layer, {6}), compute, options.weights == WeightHome::kResident, kernels),
      input_norm_(at::empty({config.hidden_size}, compute)),
      middle_norm_(at::empty({config.hidden_size}, compute)) {}

std::vector<DecoderLayer::BaseTensor> DecoderLayer::base_tensors() {
  std::vector<BaseTensor> tensors;
  for (LoraLinear* linear : linears()) {
    for (size_t m = 0; m < linear->modules().size(); ++m) {
      tensors.push_back({absl::StrCat(linear->modules()[m].name, ".weight"), linear, m, {linear->modules()[m].out, linear->in()}, linear->base_weight(m)});
    }
  }
  tensors.push_back({absl::StrCat("model.layers.", layer_, ".input_layernorm.weight"), nullptr, 0, input_norm_.sizes().vec(), input_norm_});
  tensors.push_back({absl::StrCat("model.layers.", layer_, ".post_attention_layernorm.weight"), nullptr, 0, middle_norm_.sizes().vec(), middle_norm_});
  return tensors;
}

absl::Status DecoderLayer::Load(const TensorSource& source) {
  for (const BaseTensor& tensor : base_tensors()) PPFT_RETURN_IF_ERROR(LoadBaseTensor(source, tensor.name, tensor.weight));
  return absl::OkStatus();
}

int64_t DecoderLayer::weight_size() const { return qkv_.weight_size() + o_.weight_size() + gate_up_.weight_size() + down_.weight_size(); }

void DecoderLayer::Place(const at::Tensor& weights) {
  int64_t offset = 0;
  for (LoraLinear* linear : linears()) {
    linear->Place(weights.narrow(0, offset, linear->weight_size()));
    offset += linear->weight_size();
  }
}

LayerSizes DecoderLayer::sizes() const {
  LayerSizes sizes;
  sizes.hidden = config_.hidden_size;
  sizes.q_heads = config_.num_attention_heads;
  sizes.qkv = heads_.row_size();
  sizes.attention = heads_.q_size() + o_.lora_columns();
  sizes.gate_up = 2 * config_.intermediate_size;
  sizes.qkv_lora = qkv_.lora_columns();
  sizes.gate_up_lora = gate_up_.lora_columns();
  sizes.down_lora = down_.lora_columns();
  return sizes;
}

// Keyed by (seed, step, micro-batch, layer, module): the same numbers whatever stage the layer is on.
std::vector<DropoutSequence> DecoderLayer::DropoutOf(const LayerPass& pass, const LoraLinear& linear) const {
  if (lora_.dropout <= 0 || !pass.input.training || linear.lora_columns() == 0) return {};
  const uint64_t step = static_cast<uint64_t>(pass.input.step);
  const data::PhiloxBlock key = data::Philox4x32({static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), static_cast<uint32_t>(pass.input.microbatch),
                                                  static_cast<uint32_t>(data::PhiloxDomain::kDropout)},
                                                 {static_cast<uint32_t>(lora_.seed), static_cast<uint32_t>(lora_.seed >> 32)});
  std::vector<DropoutSequence> sequences;
  for (const LoraModule& module : linear.modules()) {
    sequences.push_back({{key[0], key[1]}, static_cast<uint32_t>(layer_ * 8 + module.index), lora_.dropout});
  }
  return sequences;
}

at::Tensor DecoderLayer::DroppedBuffer(const LayerPass& pass, const std::vector<DropoutSequence>& dropout, int64_t rows, int64_t columns) const {
  return dropout.empty() ? at::Tensor() : pass.scratch.Get(Scratch::kDropped, rows, columns);
}

void DecoderLayer::Apply(const LayerPass& pass, LoraLinear& layer, const at::Tensor& x, const at::Tensor& y) {
  const std::vector<DropoutSequence> dropout = DropoutOf(pass, layer);
  layer.Forward(x, y, dropout, DroppedBuffer(pass, dropout, x.size(0), layer.in()));
}

at::Tensor DecoderLayer::Forward(const LayerPass& pass, const at::Tensor& base, const at::Tensor& delta, const LayerActivations& saved) {
  const at::Tensor x3 = ForwardToDown(pass, base, delta, saved);
  const at::Tensor block_out = pass.scratch.Get(Scratch::kBlockOut, x3.size(0), config_.hidden_size);
  Apply(pass, down_, x3, block_out);
  saved.down_lora.copy_(x3.narrow(1, config_.intermediate_size, down_.lora_columns()));
  return block_out;
}

at::Tensor DecoderLayer::ForwardToDown(const LayerPass& pass, const at::Tensor& base, const at::Tensor& delta, const LayerActivations& saved) {
  const int64_t tokens = base.size(0);
  const int64_t hidden = config_.hidden_size;
  const at::Tensor x1 = pass.scratch.Get(Scratch::kNormed, tokens, hidden + qkv_.lora_columns());
  kernels_.AddRmsNorm(base, delta, input_norm_, config_.rms_norm_eps, saved.hidden, x1.narrow(1, 0, hidden), saved.hidden_rstd);
  Apply(pass, qkv_, x1, saved.qkv);
  saved.qkv_lora.copy_(x1.narrow(1, hidden, qkv_.lora_columns()));
  kernels_.Rope(saved.qkv, heads_, pass.rope.cos(), pass.rope.sin(), pass.position, /*inverse=*/false);
  kernels_.Attention(saved.qkv, heads_, pass.input.cu_seqlens, saved.attention.narrow(1, 0, heads_.q_size()), saved.lse);
  const at::Tensor block_out = pass.scratch.Get(Scratch::kBlockOut, tokens, hidden);
  Apply(pass, o_, saved.attention, block_out);

  const at::Tensor x2 = pass.scratch.Get(Scratch::kNormed, tokens, hidden + gate_up_.lora_columns());
  kernels_.AddRmsNorm(saved.hidden, block_out, middle_norm_, config_.rms_norm_eps, saved.middle, x2.narrow(1, 0, hidden), saved.middle_rstd);
  return Gate(pass, x2, saved);
}

at::Tensor DecoderLayer::Gate(const LayerPass& pass, const at::Tensor& x, const LayerActivations& saved) {
  Apply(pass, gate_up_, x, saved.gate_up);
  saved.gate_up_lora.copy_(x.narrow(1, config_.hidden_size, gate_up_.lora_columns()));
  const at::Tensor gated = pass.scratch.Get(Scratch::kGated, x.size(0), config_.intermediate_size + down_.lora_columns());
  kernels_.SwiGlu(saved.gate_up, gated.narrow(1, 0, config_.intermediate_size));
  return gated;
}

void DecoderLayer::Recompute(const LayerPass& pass, const LayerActivations& saved) {
  const at::Tensor x3 = ForwardToDown(pass, saved.hidden, at::Tensor(), saved);
  const std::vector<DropoutSequence> dropout = DropoutOf(pass, down_);
  down_.FillColumns(x3, dropout, DroppedBuffer(pass, dropout, x3.size(0), down_.in()));
  saved.down_lora.copy_(x3.narrow(1, config_.intermediate_size, down_.lora_columns()));
}

void DecoderLayer::RecomputeGateUp(const LayerPass& pass, const LayerActivations& saved) {
  const int64_t hidden = config_.hidden_size;
  const at::Tensor x2 = pass.scratch.Get(Scratch::kNormed, saved.middle.size(0), hidden + gate_up_.lora_columns());
  kernels_.ApplyRmsNorm(saved.middle, saved.middle_rstd, middle_norm_, x2.narrow(1, 0, hidden));
  Apply(pass, gate_up_, x2, saved.gate_up);
}

void DecoderLayer::Backward(const LayerPass& pass, const LayerActivations& saved, const at::Tensor& dhidden, bool input_gradient) {
  const int64_t tokens = dhidden.size(0);
  const int64_t hidden = config_.hidden_size;
  const int64_t ffn = config_.intermediate_size;
  // Returns the gradient of the linear's input: rows [T, in] of scratch kGradient.
  const auto linear = [&](LoraLinear& layer, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& lora, bool dx_needed) {
    const std::vector<DropoutSequence> dropout = DropoutOf(pass, layer);
    const at::Tensor dx = pass.scratch.Get(Scratch::kGradient, tokens, layer.in() + layer.lora_columns());
    layer.Backward(dy, x, lora, dx, dx_needed, dropout, DroppedBuffer(pass, dropout, tokens, layer.in()));
    return dx.narrow(1, 0, layer.in());
  };

  at::Tensor gated;
  if (down_.lora_columns() > 0) {
    gated = pass.scratch.Get(Scratch::kGated, tokens, ffn);
    kernels_.SwiGlu(saved.gate_up, gated);
  }
  const at::Tensor dgated = linear(down_, dhidden, gated, saved.down_lora, true);
  const at::Tensor dgate_up = saved.gate_up;  // in place: the saved values are not needed again
  kernels_.SwiGluBackward(dgated, saved.gate_up, dgate_up);
  const at::Tensor normed = pass.scratch.Get(Scratch::kNormed, tokens, hidden);
  if (gate_up_.lora_columns() > 0) kernels_.ApplyRmsNorm(saved.middle, saved.middle_rstd, middle_norm_, normed);
  const at::Tensor dnormed2 = linear(gate_up_, dgate_up, normed, saved.gate_up_lora, true);
  kernels_.RmsNormBackward(dnormed2, saved.middle, saved.middle_rstd, middle_norm_, dhidden);

  const at::Tensor attention = saved.attention.narrow(1, 0, heads_.q_size());
  const at::Tensor dattention = linear(o_, dhidden, attention, saved.attention.narrow(1, heads_.q_size(), o_.lora_columns()), true);
  const at::Tensor dqkv = pass.scratch.Get(Scratch::kQkvGradient, tokens, heads_.row_size());
  kernels_.AttentionBackward(dattention, saved.qkv, heads_, pass.input.cu_seqlens, attention, saved.lse, dqkv);
  kernels_.Rope(dqkv, heads_, pass.rope.cos(), pass.rope.sin(), pass.position, /*inverse=*/true);
  if (qkv_.lora_columns() > 0) kernels_.ApplyRmsNorm(saved.hidden, saved.hidden_rstd, input_norm_, normed);
  const at::Tensor dnormed1 = linear(qkv_, dqkv, normed, saved.qkv_lora, input_gradient);
  if (input_gradient) kernels_.RmsNormBackward(dnormed1, saved.hidden, saved.hidden_rstd, input_norm_, dhidden);
}

}  // namespace ppft::trainer
