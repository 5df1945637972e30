// One micro-batch as a stage computes it: padded to a multiple of tokens and of targets, its numbers in one block on the stage's device. The block keeps its
// address while its capacity lasts, so that a captured pass finds the next micro-batch where it found the one before.
//
// Padding: one more document whose rows are zeros at the stage's entry, no target, and whose gradients therefore are zeros; targets that point to no row.
// Thread: one at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/trainer/kernels/kernels.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// How a stage lays out its micro-batches.
struct MicrobatchLayout {
  at::Device device = at::kCPU;
  HeadLayout heads;
  int64_t out_stride = 0;  // of attention's output
  int64_t multiple = 1;    // tokens and targets are padded to it; 1 on the CPU
  uint64_t seed = 0;       // of the dropout
  bool dropout = false;    // the block has room for what the rows draw
};

struct MicrobatchTensors {
  int64_t real_tokens = 0;
  int64_t tokens = 0;   // T, with padding
  int64_t targets = 0;  // with padding
  bool training = true;
  Documents documents;  // padding is one of them
  // What passes depend on: the number of documents and the longest one's tokens, rounded up to powers of two as Kernels may do.
  int64_t document_capacity = 0;
  int64_t uniform = 0;  // tokens of each document where all have the same number
  int64_t longest = 0;
  at::Tensor ids;          // [real_tokens] int64; first stage
  at::Tensor position;     // [T] int32
  at::Tensor target_rows;  // [targets] int64; last stage. Padding: row 0
  at::Tensor target_ids;   // [targets] int64. Padding: -1
  at::Tensor target_of;    // [T] int32: the row's index in target_rows, -1 without a target; last stage
  LossWeight loss_weight = 1.0;
  // [T, 4] int32, DropoutSequence::rows: keys of (seed, step, micro-batch) and the row in it, so that a row draws the same whatever stage a layer is on and
  // whatever micro-batches go with its own. Undefined without dropout.
  at::Tensor dropout_rows;

  at::Tensor block;  // [bytes] int8: what the tensors above are views of
};

// Tokens of a micro-batch with its padding.
int64_t PaddedTokens(const MicrobatchLayout& layout, const MicrobatchInput& input);

// Fills `tensors` from `input`, over what it held before. `capacity`: tokens that its block is to last for. On a device the upload is queued on the current
// stream. Returns whether the block has moved.
bool FillMicrobatch(const MicrobatchLayout& layout, const Kernels& kernels, const MicrobatchInput& input, int64_t capacity, MicrobatchTensors* tensors);

}  // namespace ppft::trainer
