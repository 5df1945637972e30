#include "worker/trainer/model/decoder_layer.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
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
      qkv_(config.hidden_size, lora_, StackOf(config, lora_, layer, {0, 1, 2}), compute, options.weights == WeightHome::kResident, true, kernels),
      o_(config.query_size(), lora_, StackOf(config, lora_, layer, {3}), compute, options.weights == WeightHome::kResident, true, kernels),
      gate_up_(config.hidden_size, lora_, StackOf(config, lora_, layer, {4, 5}), compute, options.weights == WeightHome::kResident, false, kernels),
      down_(config.intermediate_size, lora_, StackOf(config, lora_, layer, {6}), compute, options.weights == WeightHome::kResident, true, kernels),
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

std::vector<DropoutSequence> DecoderLayer::DropoutOf(const LayerPass& pass, const LoraLinear& linear) const {
  if (lora_.dropout <= 0 || !pass.microbatch.training || linear.lora_columns() == 0) return {};
  std::vector<DropoutSequence> sequences;
  for (const LoraModule& module : linear.modules()) {
    sequences.push_back({{}, static_cast<uint32_t>(layer_ * 8 + module.index), lora_.dropout, pass.microbatch.dropout_rows});
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
  const MicrobatchTensors& microbatch = pass.microbatch;
  const at::Tensor attended = saved.attention.narrow(1, 0, heads_.q_size());
  // Where the device wants parts, saved.qkv holds those and the rows pass through scratch.
  const at::Tensor rows = kernels_.wants_parts() ? pass.scratch.Get(Scratch::kQkvGradient, tokens, heads_.row_size()) : saved.qkv;
  Apply(pass, qkv_, x1, rows);
  saved.qkv_lora.copy_(x1.narrow(1, hidden, qkv_.lora_columns()));
  if (kernels_.wants_parts()) {
    const QkvParts parts = PartsOf(saved.qkv, heads_);
    kernels_.RopeToParts(rows, heads_, pass.rope.cos(), pass.rope.sin(), microbatch.position, parts);
    kernels_.AttentionOfParts(parts, heads_, microbatch.documents, attended, saved.lse);
  } else {
    kernels_.Rope(rows, heads_, pass.rope.cos(), pass.rope.sin(), microbatch.position, /*inverse=*/false);
    kernels_.Attention(rows, heads_, microbatch.documents, attended, saved.lse);
  }
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
  BackwardMlp(pass, saved, dhidden);
  BackwardAttention(pass, saved, dhidden, input_gradient);
}

void DecoderLayer::BackwardMlp(const LayerPass& pass, const LayerActivations& saved, const at::Tensor& dhidden) {
  const int64_t tokens = dhidden.size(0);
  const LinearGradient down = InputGradient(pass, down_, dhidden, true);
  const at::Tensor dgate_up = saved.gate_up;  // in place: the saved values are not needed again
  // With adapters on all three, some of their sums may be made on the way.
  const bool all_adapted = lora_.r > 0 && down_.lora_columns() == lora_.r && gate_up_.lora_columns() == 2 * lora_.r;
  const std::vector<LoraModule>& two = gate_up_.modules();
  const bool summed = all_adapted && down.dropout.empty() &&
                      kernels_.SwiGluBackwardSums(down.dx, saved.gate_up, saved.gate_up_lora, down.d, gate_up_.scale(), two[0].b_gradient, two[1].b_gradient,
                                                  down_.modules()[0].a_gradient, /*room=*/pass.scratch.Get(Scratch::kQkvGradient, tokens, heads_.row_size()));
  if (summed) {
    AdapterGradients(down_, down, dhidden, at::Tensor(), saved.down_lora, LoraLinear::Missing::kB);
  } else if (down_.lora_columns() > 0) {
    const at::Tensor gated = InPlace() ? down.dx : pass.scratch.Get(Scratch::kGated, tokens, config_.intermediate_size);
    kernels_.SwiGluBackwardAndGated(down.dx, saved.gate_up, gated);
    AdapterGradients(down_, down, dhidden, gated, saved.down_lora);
  } else {
    kernels_.SwiGluBackward(down.dx, saved.gate_up, dgate_up);
  }
  const LinearGradient gate_up = InputGradient(pass, gate_up_, dgate_up, true);
  const at::Tensor x2 = ThroughNorm(pass, gate_up_, gate_up, saved.middle, saved.middle_rstd, middle_norm_, dhidden, true);
  AdapterGradients(gate_up_, gate_up, dgate_up, x2, saved.gate_up_lora, summed ? LoraLinear::Missing::kA : LoraLinear::Missing::kBoth);
}

void DecoderLayer::BackwardAttention(const LayerPass& pass, const LayerActivations& saved, const at::Tensor& dhidden, bool input_gradient) {
  const int64_t tokens = dhidden.size(0);
  const at::Tensor attention = saved.attention.narrow(1, 0, heads_.q_size());
  // The gradients of q, k and v, apart, lie behind attention's.
  const int64_t o_columns = o_.in() + o_.lora_columns();
  at::Tensor block;
  if (kernels_.wants_parts()) {
    const at::Tensor both = pass.scratch.Get(Scratch::kGradient, tokens, o_columns + heads_.row_size()).view({-1});
    block = both.narrow(0, tokens * o_columns, tokens * heads_.row_size()).view({tokens, heads_.row_size()});
  }
  const LinearGradient o = InputGradient(pass, o_, dhidden, true);
  AdapterGradients(o_, o, dhidden, attention, saved.attention.narrow(1, heads_.q_size(), o_.lora_columns()));
  const at::Tensor dqkv = pass.scratch.Get(Scratch::kQkvGradient, tokens, heads_.row_size() + qkv_.gradient_columns()).narrow(1, 0, heads_.row_size());
  const MicrobatchTensors& microbatch = pass.microbatch;
  if (block.defined()) {
    const QkvParts gradients = PartsOf(block, heads_);
    kernels_.AttentionBackwardOfParts(o.dx, PartsOf(saved.qkv, heads_), heads_, microbatch.documents, attention, saved.lse, gradients,
                                      /*room=*/saved.gate_up);
    kernels_.RopeFromParts(gradients, heads_, pass.rope.cos(), pass.rope.sin(), microbatch.position, dqkv);
  } else {
    kernels_.AttentionBackward(o.dx, saved.qkv, heads_, microbatch.documents, attention, saved.lse, dqkv);
    kernels_.Rope(dqkv, heads_, pass.rope.cos(), pass.rope.sin(), microbatch.position, /*inverse=*/true);
  }
  const LinearGradient qkv = InputGradient(pass, qkv_, dqkv, input_gradient);
  const at::Tensor x1 = ThroughNorm(pass, qkv_, qkv, saved.hidden, saved.hidden_rstd, input_norm_, dhidden, input_gradient);
  AdapterGradients(qkv_, qkv, dqkv, x1, saved.qkv_lora);
}

DecoderLayer::LinearGradient DecoderLayer::InputGradient(const LayerPass& pass, LoraLinear& layer, const at::Tensor& dy, bool dx_needed) {
  LinearGradient gradient;
  gradient.dropout = DropoutOf(pass, layer);
  gradient.dropped = DroppedBuffer(pass, gradient.dropout, dy.size(0), layer.in());
  const at::Tensor dx = pass.scratch.Get(Scratch::kGradient, dy.size(0), layer.in() + layer.lora_columns());
  gradient.d = layer.InputGradient(dy, dx, dx_needed, gradient.dropout, gradient.dropped);
  gradient.dx = dx.narrow(1, 0, layer.in());
  return gradient;
}

void DecoderLayer::AdapterGradients(LoraLinear& layer, const LinearGradient& gradient, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& lora,
                                    LoraLinear::Missing missing) {
  layer.AdapterGradients(dy, x, lora, gradient.d, gradient.dropout, gradient.dropped, missing);
}

at::Tensor DecoderLayer::ThroughNorm(const LayerPass& pass, const LoraLinear& layer, const LinearGradient& gradient, const at::Tensor& x,
                                     const at::Tensor& rstd, const at::Tensor& weight, const at::Tensor& dhidden, bool dx_needed) {
  const at::Tensor normed = InPlace() ? gradient.dx : pass.scratch.Get(Scratch::kNormed, dhidden.size(0), config_.hidden_size);
  if (layer.lora_columns() == 0) {
    if (dx_needed) kernels_.RmsNormBackward(gradient.dx, x, rstd, weight, dhidden);
  } else if (dx_needed) {
    kernels_.RmsNormBackwardAndNormed(gradient.dx, x, rstd, weight, dhidden, normed);
  } else {
    kernels_.ApplyRmsNorm(x, rstd, weight, normed);
  }
  return normed;
}

}  // namespace ppft::trainer
