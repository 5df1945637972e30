// One Llama decoder layer: RMSNorm, attention with RoPE and grouped-query heads (GQA, 2305.13245), RMSNorm, SwiGLU MLP; seven linears as four
// LoraLinear.
//
// The residual stream enters as base + delta and leaves the same way, so that the addition happens inside the next norm. Shapes: T = tokens, hidden.
// Thread: one at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "common/model/config.h"
#include "worker/trainer/kernels/kernels.h"
#include "worker/trainer/model/activations.h"
#include "worker/trainer/model/lora_linear.h"
#include "worker/trainer/model/microbatch_tensors.h"
#include "worker/trainer/model/rope.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// What is the same for all layers of one pass over one micro-batch.
struct LayerPass {
  const MicrobatchTensors& microbatch;
  const RopeTable& rope;
  Scratch& scratch;
};

class DecoderLayer {
 public:
  DecoderLayer(const model::ModelConfig& config, const StageOptions& options, int64_t layer, const at::TensorOptions& compute, Kernels& kernels);

  // Copies the nine tensors of the layer from the base model. Without matrices of its own (weights other than kResident) they have to be placed before.
  absl::Status Load(const TensorSource& source);
  // Elements of the layer's matrices with their adapters' columns.
  int64_t weight_size() const;
  // Uses `weights` ([weight_size()], contiguous) as the matrices from now on and writes the adapters' columns into them.
  void Place(const at::Tensor& weights);
  LayerSizes sizes() const;
  const HeadLayout& heads() const { return heads_; }

  // saved: T rows. delta may be undefined. Returns the layer's contribution to its residual stream saved.middle: [T, hidden] scratch kBlockOut.
  at::Tensor Forward(const LayerPass& pass, const at::Tensor& base, const at::Tensor& delta, const LayerActivations& saved);
  // What Forward put into `saved`, again and to the bit: everything (from saved.hidden), or gate_up alone (from saved.middle).
  void Recompute(const LayerPass& pass, const LayerActivations& saved);
  void RecomputeGateUp(const LayerPass& pass, const LayerActivations& saved);
  // dhidden: rows [T, hidden] with gradient_columns() more behind them, gradient of the layer's output; becomes the gradient of its input (unspecified unless
  // input_gradient).
  void Backward(const LayerPass& pass, const LayerActivations& saved, const at::Tensor& dhidden, bool input_gradient);

  // What the rows of dhidden must have room for.
  int64_t gradient_columns() const { return std::max(o_.gradient_columns(), down_.gradient_columns()); }

  // q,k,v; o; gate,up; down.
  std::vector<LoraLinear*> linears() { return {&qkv_, &o_, &gate_up_, &down_}; }
  // Each tensor of the layer: a module's index in `linear`, or a norm's weight.
  struct BaseTensor {
    std::string name;
    LoraLinear* linear = nullptr;  // nullptr: a norm
    size_t module = 0;
    std::vector<int64_t> shape;
    at::Tensor weight;  // compute dtype, a view; undefined for a matrix that is not placed
  };
  std::vector<BaseTensor> base_tensors();

 private:
  // Up to the input of the last linear, with its columns: rows [T, intermediate + R] of scratch kGated.
  at::Tensor ForwardToDown(const LayerPass& pass, const at::Tensor& base, const at::Tensor& delta, const LayerActivations& saved);
  at::Tensor Gate(const LayerPass& pass, const at::Tensor& x, const LayerActivations& saved);
  void Apply(const LayerPass& pass, LoraLinear& layer, const at::Tensor& x, const at::Tensor& y);
  // Through down, SwiGLU, gate and up and their norm; saved.gate_up becomes its gradient.
  void BackwardMlp(const LayerPass& pass, const LayerActivations& saved, const at::Tensor& dhidden);
  // Through o, attention, RoPE, q, k and v and their norm; overwrites saved.gate_up.
  void BackwardAttention(const LayerPass& pass, const LayerActivations& saved, const at::Tensor& dhidden, bool input_gradient);
  // Of one linear, on the way back through it.
  struct LinearGradient {
    at::Tensor dx;  // of its input: rows [T, in] of scratch kGradient
    at::Tensor d;   // [T, R], for the adapters' gradients
    std::vector<DropoutSequence> dropout;
    at::Tensor dropped;
  };
  LinearGradient InputGradient(const LayerPass& pass, LoraLinear& layer, const at::Tensor& dy, bool dx_needed);
  static void AdapterGradients(LoraLinear& layer, const LinearGradient& gradient, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& lora,
                               LoraLinear::Missing missing = LoraLinear::Missing::kBoth);
  // Through a norm that feeds `layer`: adds to dhidden and gives the norm's output again.
  at::Tensor ThroughNorm(const LayerPass& pass, const LoraLinear& layer, const LinearGradient& gradient, const at::Tensor& x, const at::Tensor& rstd,
                         const at::Tensor& weight, const at::Tensor& dhidden, bool dx_needed);
  bool InPlace() const { return kernels_.wants_parts(); }  // the input of a linear, made again, takes the place of its gradient
  std::vector<DropoutSequence> DropoutOf(const LayerPass& pass, const LoraLinear& linear) const;
  at::Tensor DroppedBuffer(const LayerPass& pass, const std::vector<DropoutSequence>& dropout, int64_t rows, int64_t columns) const;

  const model::ModelConfig config_;
  const LoraOptions lora_;
  const int64_t layer_;
  const HeadLayout heads_;
  Kernels& kernels_;
  LoraLinear qkv_, o_, gate_up_, down_;
  at::Tensor input_norm_;   // [hidden]
  at::Tensor middle_norm_;  // [hidden]
};

// The base model's tensor of that name in `like`'s shape; INVALID_ARGUMENT names tensor and shapes if they differ.
absl::Status LoadBaseTensor(const TensorSource& source, const std::string& name, const at::Tensor& into);

}  // namespace ppft::trainer
