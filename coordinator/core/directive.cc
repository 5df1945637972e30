#include "coordinator/core/directive.h"

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace ppft::coordinator {
namespace {

constexpr absl::string_view kLayerPrefix = "model.layers.";

// The layer of a tensor's name, -1 if it belongs to none.
int64_t LayerOf(absl::string_view name) {
  if (!absl::ConsumePrefix(&name, kLayerPrefix)) return -1;
  int64_t layer = -1;
  return absl::SimpleAtoi(name.substr(0, name.find('.')), &layer) ? layer : -1;
}

}  // namespace

std::vector<v1::TensorRef> TensorsOf(const v1::ModelRecord& model, const v1::Plan& plan, const v1::RankPlan& rank) {
  std::vector<v1::TensorRef> tensors;
  for (const v1::ModelRecord::Tensor& tensor : model.tensors()) {
    const std::string& name = tensor.tensor().name();
    const int64_t layer = LayerOf(name);
    const bool tied = model.model().tie_word_embeddings();
    bool wanted = false;
    for (const int32_t index : rank.stages()) {
      if (index < 0 || index >= plan.stages_size()) continue;
      const v1::StagePlan& stage = plan.stages(index);
      if (layer >= 0) {
        wanted = wanted || (layer >= stage.first_layer() && layer < stage.first_layer() + stage.num_layers());
      } else if (name == "model.embed_tokens.weight") {
        wanted = wanted || stage.has_embedding() || (stage.has_head() && tied);
      } else if (name == "lm_head.weight") {
        wanted = wanted || (stage.has_head() && !tied);
      } else if (name == "model.norm.weight") {
        wanted = wanted || stage.has_head();
      }
    }
    if (wanted) tensors.push_back(tensor.tensor());
  }
  return tensors;
}

std::string MergeDtype(const v1::JobSpec& spec, const v1::Model& model) {
  if (!spec.output().merge_dtype().empty()) return spec.output().merge_dtype();
  if (model.dtype() == "BF16") return "bfloat16";
  if (model.dtype() == "F16") return "float16";
  return "float32";
}

v1::RankDirective DirectiveOf(const AttemptInputs& inputs, const v1::RankPlan& rank) {
  const v1::JobRecord& record = *inputs.record;
  v1::RankDirective directive;
  directive.mutable_rank()->set_job_id(record.job().id());
  directive.mutable_rank()->set_epoch(record.job().status().attempt_epoch());
  directive.mutable_rank()->set_rank(rank.rank());
  directive.set_device(rank.device());
  *directive.mutable_spec() = record.job().spec();
  *directive.mutable_plan() = record.plan();
  directive.set_model_config(inputs.model->config());
  for (const v1::TensorRef& tensor : TensorsOf(*inputs.model, record.plan(), rank)) *directive.add_tensors() = tensor;
  *directive.mutable_train_tokens() = record.prepared().train_tokens();
  if (record.prepared().has_eval_tokens()) *directive.mutable_eval_tokens() = record.prepared().eval_tokens();
  for (const v1::FileRef& file : inputs.init_adapter) *directive.add_init_adapter() = file;
  if (inputs.resume != nullptr) *directive.mutable_resume() = *inputs.resume;
  if (inputs.best != nullptr) *directive.mutable_best() = *inputs.best;
  if (inputs.endpoints != nullptr && static_cast<int>(inputs.endpoints->size()) == record.plan().ranks_size()) {
    for (const auto& [peer, address] : *inputs.endpoints) {
      v1::Endpoint& endpoint = *directive.add_peers();
      endpoint.set_rank(peer);
      endpoint.set_address(address);
    }
  }
  if (inputs.trace != nullptr) *directive.mutable_trace() = *inputs.trace;
  directive.set_merge_dtype(MergeDtype(record.job().spec(), inputs.model->model()));
  return directive;
}

}  // namespace ppft::coordinator
