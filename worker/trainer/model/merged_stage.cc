#include "worker/trainer/model/merged_stage.h"

#include "absl/status/statusor.h"
#include "common/base/status.h"

namespace ppft::trainer {

absl::Status ForEachMergedTensor(const StageParts& stage, at::ScalarType dtype,
                                 const std::function<absl::Status(const std::string& name, const at::Tensor& tensor)>& visit) {
  const at::ScalarType acc = stage.options.compute == at::kDouble ? at::kDouble : at::kFloat;
  // A narrow compute copy has lost digits that the file on disk may have.
  const auto original = [&](const std::string& name, const at::Tensor& held) -> absl::StatusOr<at::Tensor> {
    if (held.defined() && held.scalar_type() == acc) return held;
    return stage.source(name);
  };
  const auto plain = [&](const std::string& name, const at::Tensor& held) -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const at::Tensor base, original(name, held));
    return visit(name, base.to(at::kCPU).to(dtype).contiguous());  // an embedding is too large for a second copy on the device
  };
  if (stage.options.has_embedding) PPFT_RETURN_IF_ERROR(plain(model::kEmbeddingName, stage.embedding));
  for (const auto& layer : stage.layers) {
    for (const DecoderLayer::BaseTensor& tensor : layer->base_tensors()) {
      if (tensor.linear == nullptr) {
        PPFT_RETURN_IF_ERROR(plain(tensor.name, tensor.weight));
        continue;
      }
      PPFT_ASSIGN_OR_RETURN(const at::Tensor base, original(tensor.name, stage.options.weights == WeightHome::kResident ? tensor.weight : at::Tensor()));
      PPFT_RETURN_IF_ERROR(visit(tensor.name, tensor.linear->Merged(tensor.module, base).to(dtype).to(at::kCPU).contiguous()));
    }
  }
  if (stage.head == nullptr) return absl::OkStatus();
  PPFT_RETURN_IF_ERROR(plain(model::kFinalNormName, stage.head->norm()));
  if (stage.config.tie_word_embeddings) return absl::OkStatus();
  return plain(model::kHeadName, stage.head->weight());
}

std::vector<model::ExpectedTensor> MergedTensorsOf(const StageParts& stage) {
  std::vector<model::ExpectedTensor> tensors;
  const std::vector<int64_t> vocabulary = {stage.config.vocab_size, stage.config.hidden_size};
  if (stage.options.has_embedding) tensors.push_back({model::kEmbeddingName, vocabulary});
  for (const auto& layer : stage.layers) {
    for (const DecoderLayer::BaseTensor& tensor : layer->base_tensors()) tensors.push_back({tensor.name, tensor.shape});
  }
  if (stage.options.has_head) {
    tensors.push_back({model::kFinalNormName, {stage.config.hidden_size}});
    if (!stage.config.tie_word_embeddings) tensors.push_back({model::kHeadName, vocabulary});
  }
  return tensors;
}

}  // namespace ppft::trainer
