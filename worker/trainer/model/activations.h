// Memory of a stage: what backward needs of each micro-batch, taken from a pool, and scratch buffers that all layers share. A steady step allocates nothing
// large: buffers grow to the largest micro-batch seen and stay.
//
// Thread: one at a time, the stage's.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <map>
#include <memory>
#include <vector>

#include "worker/trainer/model/microbatch_tensors.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// Columns of one layer's saved tensors.
struct LayerSizes {
  int64_t hidden = 0;
  int64_t q_heads = 0;
  int64_t qkv = 0;        // packed row
  int64_t attention = 0;  // query size + lora columns of o
  int64_t gate_up = 0;    // 2 * intermediate
  int64_t qkv_lora = 0, gate_up_lora = 0, down_lora = 0;
};

// Saved by one layer's forward pass, T rows each. In a kept set those that the checkpointing makes again are undefined.
struct LayerActivations {
  at::Tensor hidden;        // [T, hidden] residual stream at the layer's entry
  at::Tensor hidden_rstd;   // [T] acc
  at::Tensor qkv;           // [T, qkv] after RoPE
  at::Tensor qkv_lora;      // [T, R]
  at::Tensor attention;     // [T, query size + R]: input of o, with its lora columns
  at::Tensor lse;           // [q_heads, T] acc
  at::Tensor middle;        // [T, hidden] residual stream before the MLP
  at::Tensor middle_rstd;   // [T] acc
  at::Tensor gate_up;       // [T, 2 * intermediate]; backward overwrites it with its gradient
  at::Tensor gate_up_lora;  // [T, R]
  at::Tensor down_lora;     // [T, R]

  LayerActivations Rows(int64_t tokens) const;
};

// One micro-batch in flight.
struct MicrobatchActivations {
  int64_t capacity = 0;                  // tokens that fit
  int64_t bytes = 0;                     // of the layers
  std::vector<LayerActivations> layers;  // `capacity` rows each
  MicrobatchTensors microbatch;
  at::Tensor head_gradient;  // [targets, hidden]: gradient of the last hidden state at target_rows; last stage
};

class ActivationPool {
 public:
  // What backward needs is made for at least `least_tokens`.
  ActivationPool(int num_layers, const LayerSizes& sizes, model::ActivationCheckpointing checkpointing, const at::TensorOptions& compute, at::ScalarType acc,
                 int64_t least_tokens);

  // A free set of buffers for that micro-batch, with what is kept; FindKept gives it until Release. Overwrites one that is already kept.
  MicrobatchActivations& Keep(int microbatch, int64_t tokens);
  // One layer's buffers for all layers in turn: a forward pass without a backward, and what backward makes again.
  MicrobatchActivations& Transient(int64_t tokens);
  // A layer's buffers in a set, those that are not kept taken from Transient.
  LayerActivations Rows(const MicrobatchActivations& set, size_t layer, int64_t tokens);
  MicrobatchActivations* FindKept(int microbatch);
  void Release(int microbatch);
  // With the micro-batch's numbers and the head's gradient.
  int64_t kept_bytes() const;
  int64_t held_bytes() const;  // of all sets, in use or not
  // Gives all sets back. Later ones are made for no more tokens than they are asked for.
  void EndSteps();
  // Changes whenever memory that passes with a backward use comes or goes.
  int64_t generation() const { return generation_; }

 private:
  static int64_t BytesOf(const MicrobatchActivations& set);
  std::unique_ptr<MicrobatchActivations> Allocate(size_t layers, int64_t tokens, model::ActivationCheckpointing checkpointing, bool with_hidden) const;
  // Of the transient set, whose layer has no `hidden` before it is a pass's own.
  const LayerActivations& Reserve(int64_t tokens);

  const size_t num_layers_;
  const LayerSizes sizes_;
  const model::ActivationCheckpointing checkpointing_;
  const at::TensorOptions compute_;
  const at::ScalarType acc_;
  int64_t least_tokens_;
  int64_t generation_ = 0;
  std::map<int, std::unique_ptr<MicrobatchActivations>> kept_;
  std::vector<std::unique_ptr<MicrobatchActivations>> free_;
  std::unique_ptr<MicrobatchActivations> transient_;
};

// Buffers by role; a role's content is valid until the next use of its buffer.
class Scratch {
 public:
  enum Role { kNormed, kGated, kBlockOut, kDropped, kGradient, kQkvGradient, kHiddenGradient, kHeadHidden, kHeadDelta, kHeadNormed, kLogits, kRoles };

  // Buffers are made for at least `least_rows`, those of the logits excepted. shared: roles that are never in use at once, where the backward pass works in
  // place (Kernels::wants_parts), have one buffer together.
  Scratch(const at::TensorOptions& compute, int64_t least_rows, bool shared) : compute_(compute), least_rows_(least_rows), shared_(shared) {}
  // [rows, columns] contiguous, content undefined.
  at::Tensor Get(Role role, int64_t rows, int64_t columns);
  int64_t held_bytes() const;
  // Gives all buffers back. Later ones are made for no more rows than they are asked for.
  void EndSteps();
  // Changes whenever a buffer moves.
  int64_t generation() const { return generation_; }

 private:
  const at::TensorOptions compute_;
  int64_t least_rows_;
  const bool shared_;
  int64_t generation_ = 0;
  std::array<at::Tensor, kRoles> buffers_;
};

}  // namespace ppft::trainer
