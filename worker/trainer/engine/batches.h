// The micro-batches of a step or an evaluation as a stage takes them. Every rank makes the same plan from the token file.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
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

// `loss_weight` is the gradient of the step's loss with respect to one target's -log p. An empty micro-batch has no cu_seqlens.
MicrobatchInput InputOf(const data::TokenRows& rows, const data::Microbatch& microbatch, int64_t step, double loss_weight, bool training);

// One document without targets: verification.
MicrobatchInput ProbeInput(const std::vector<int32_t>& ids);

inline int64_t TokensOf(const MicrobatchInput& input) { return input.cu_seqlens.empty() ? 0 : input.cu_seqlens.back(); }

}  // namespace ppft::trainer
