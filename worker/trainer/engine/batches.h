// The micro-batches of a step or an evaluation as a stage takes them: one or several in a pass. Every rank makes the same plan from the token file.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/files.h"
#include "common/data/batch_plan.h"
#include "common/data/token_file.h"
#include "worker/trainer/engine/config.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// A mapped token file. DATA_LOSS names the path and what is wrong; INVALID_ARGUMENT for a token id that the model does not have.
class TokenData {
 public:
  static absl::StatusOr<std::unique_ptr<TokenData>> Open(const std::string& path, int64_t vocab_size);
  const data::TokenRows& rows() const { return file_.rows; }

 private:
  MappedFile mapping_;
  data::TokenFile file_;
};

data::SamplerOptions SamplerOptionsOf(const TrainerConfig& config);

// What is the same for all inputs of a step or an evaluation.
struct InputOptions {
  int64_t step = 0;
  double loss_weight = 1;  // the gradient of the step's loss with respect to one target's -log p
  bool training = true;
};

// One pass over these micro-batches of a replica, one after the other. Without a token it has no cu_seqlens.
MicrobatchInput InputOf(const data::TokenRows& rows, absl::Span<const data::Microbatch> microbatches, const InputOptions& options);

// The passes over a replica's micro-batches: `per_pass` (at least 1) consecutive ones each, the last with what is left.
std::vector<MicrobatchInput> InputsOf(const data::TokenRows& rows, absl::Span<const data::Microbatch> microbatches, int per_pass, const InputOptions& options);

// One document without targets: verification.
MicrobatchInput ProbeInput(const std::vector<int32_t>& ids);

inline int64_t TokensOf(const MicrobatchInput& input) { return input.cu_seqlens.empty() ? 0 : input.cu_seqlens.back(); }

}  // namespace ppft::trainer
