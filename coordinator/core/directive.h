// The desired state of one rank. PURE.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ppft/v1/stored.pb.h"
#include "ppft/v1/worker.pb.h"

namespace ppft::coordinator {

// All that the ranks of one attempt are told, equal for the attempt's whole life but for the endpoints and traces.
struct AttemptInputs {
  const v1::JobRecord* record = nullptr;
  const v1::ModelRecord* model = nullptr;
  const v1::CheckpointManifest* resume = nullptr;  // nullptr: from the beginning
  const v1::CheckpointManifest* best = nullptr;    // nullptr: none is known
  std::vector<v1::FileRef> init_adapter;
  const std::map<int32_t, std::string>* endpoints = nullptr;  // rank -> HOST:PORT, of those that listen
  const v1::TraceOrder* trace = nullptr;                      // nullptr: none is wanted
};

v1::RankDirective DirectiveOf(const AttemptInputs& inputs, const v1::RankPlan& rank);

// The tensors of the stages that a rank holds, in the model's order. With tied embeddings the head stage gets the embedding.
std::vector<v1::TensorRef> TensorsOf(const v1::ModelRecord& model, const v1::Plan& plan, const v1::RankPlan& rank);

// output.merge_dtype, or the base model's own type: float32 | bfloat16 | float16.
std::string MergeDtype(const v1::JobSpec& spec, const v1::Model& model);

}  // namespace ppft::coordinator
