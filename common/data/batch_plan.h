// Which rows make up which micro-batch of which step: seeded shuffle, packing, the data cursor, evaluation batches, and the assembly of a
// micro-batch's arrays. A plan is a function of (row sizes, options) alone, so every rank computes the same one, and a resumed run needs only
// the step. Pure; a Sampler is used by one thread at a time.
//
// Rows are numbered from 0 in the token file's order. Steps count from 1 over the whole job, epochs from 0.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "common/data/token_file.h"

namespace ppft::data {

struct SamplerOptions {
  uint64_t seed = 42;
  bool shuffle = true;  // a new order each epoch; false: the file's order
  bool sample_packing = true;
  int64_t sequence_len = 1024;
  int64_t micro_batch_size = 4;
  int64_t num_microbatches = 8;  // per step and replica: gradient_accumulation_steps
  int64_t data_parallel_size = 1;
};

// tokens and targets of each row, without the tokens themselves.
struct RowSizes {
  std::vector<int32_t> tokens;
  std::vector<int32_t> targets;
};
RowSizes SizesOf(const TokenRows& rows);

struct Microbatch {
  int64_t index = 0;          // in the step over all replicas: slot * data_parallel_size + replica; in an evaluation plan: its place in the list
  std::vector<int64_t> rows;  // empty: nothing is left of the epoch, all ranks skip it
  int64_t tokens = 0;
  int64_t targets = 0;
};

struct StepPlan {
  int64_t step = 0;
  int64_t epoch_index = 0;                            // which pass over the rows, from 0
  double epoch = 0;                                   // passes done after this step, as transformers logs it: 1.0 after the first pass's last step
  std::vector<std::vector<Microbatch>> microbatches;  // [data_parallel_size][num_microbatches]
  int64_t tokens = 0;                                 // of all replicas
  int64_t targets = 0;                                // of all replicas: the divisor of the step's loss
};

// Micro-batches of an epoch, in order: without packing the next micro_batch_size rows each; with packing bins of micro_batch_size * sequence_len
// tokens, filled by first fit over the newest kPackingWindow bins. A step takes the next num_microbatches * data_parallel_size of them, the last
// step of an epoch what is left. The i-th of a step goes to replica i % data_parallel_size, so a step's content depends only on the product.
class Sampler {
 public:
  static constexpr int64_t kPackingWindow = 64;

  // INVALID_ARGUMENT: no rows, an empty row, a row longer than sequence_len, sizes below 1.
  static absl::StatusOr<Sampler> Create(RowSizes sizes, const SamplerOptions& options);

  // Number of optimizer steps of that epoch; with packing and shuffle it may differ from epoch to epoch.
  int64_t StepsPerEpoch(int64_t epoch_index);
  // max_steps if it is above 0, else the steps of num_epochs passes; the part of a pass is rounded up to whole steps.
  int64_t TotalSteps(double num_epochs, int64_t max_steps);
  // Any step >= 1, in any order; the current epoch is kept, so going on costs only the rows of the step.
  StepPlan Step(int64_t step);

 private:
  Sampler(RowSizes sizes, const SamplerOptions& options) : sizes_(std::move(sizes)), options_(options) {}
  void LoadEpoch(int64_t epoch_index);
  int64_t FirstStep(int64_t epoch_index);  // number of steps before that epoch

  RowSizes sizes_;
  SamplerOptions options_;
  int64_t loaded_epoch_ = -1;
  std::vector<Microbatch> epoch_microbatches_;  // of loaded_epoch_
  std::vector<int64_t> steps_before_ = {0};     // [known epochs + 1], running sum
};

// All rows once, in the file's order, in micro-batches of the same capacity; batch i belongs to replica i % data_parallel_size.
// The same errors as Sampler::Create.
absl::StatusOr<std::vector<Microbatch>> EvaluationPlan(const RowSizes& sizes, const SamplerOptions& options);

// The arrays of one micro-batch: documents one after the other, no padding.
struct MicrobatchArrays {
  std::vector<int32_t> cu_seqlens;   // [documents + 1], from 0 to tokens
  std::vector<int64_t> ids;          // [tokens]
  std::vector<int64_t> target_rows;  // [targets]: positions in ids whose next token is supervised, ascending
  std::vector<int64_t> target_ids;   // [targets]: those next tokens
};
MicrobatchArrays Assemble(const TokenRows& rows, const Microbatch& microbatch);

}  // namespace ppft::data
