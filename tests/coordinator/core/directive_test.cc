#include "coordinator/core/directive.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/coordinator/core/two_by_two.h"

namespace ppft::coordinator {
namespace {

using testing::ElementsAre;

v1::ModelRecord FiveLayers(bool tied) {
  v1::ModelRecord model;
  model.mutable_model()->set_tie_word_embeddings(tied);
  std::vector<std::string> names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"};
  for (int layer = 0; layer < 12; ++layer) names.push_back(absl::StrCat("model.layers.", layer, ".mlp.up_proj.weight"));
  for (const std::string& name : names) model.add_tensors()->mutable_tensor()->set_name(name);
  return model;
}

std::vector<std::string> Names(const std::vector<v1::TensorRef>& tensors) {
  std::vector<std::string> names;
  for (const v1::TensorRef& tensor : tensors) names.push_back(tensor.name());
  return names;
}

TEST(Directive, ARankGetsTheTensorsOfItsStagesAlone) {
  const v1::Plan plan = TwoByTwo();
  EXPECT_THAT(Names(TensorsOf(FiveLayers(false), plan, plan.ranks(2))), ElementsAre("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight",
                                                                                    "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"));
  EXPECT_THAT(Names(TensorsOf(FiveLayers(false), plan, plan.ranks(1))),
              ElementsAre("model.norm.weight", "lm_head.weight", "model.layers.3.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"));
}

TEST(Directive, WithTiedEmbeddingsTheHeadGetsTheEmbedding) {
  const v1::Plan plan = TwoByTwo();
  EXPECT_THAT(Names(TensorsOf(FiveLayers(true), plan, plan.ranks(1))),
              ElementsAre("model.embed_tokens.weight", "model.norm.weight", "model.layers.3.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"));
}

TEST(Directive, PeersAreNamedOnlyWhenAllListen) {
  v1::JobRecord record;
  record.mutable_job()->set_id("job-a");
  record.mutable_job()->mutable_status()->set_attempt_epoch(4);
  *record.mutable_plan() = TwoByTwo();
  const v1::ModelRecord model = FiveLayers(false);
  std::map<int32_t, std::string> endpoints = {{0, "h:1"}, {1, "h:2"}, {2, "h:3"}};
  AttemptInputs inputs{&record, &model, nullptr, nullptr, {}, &endpoints};
  EXPECT_EQ(DirectiveOf(inputs, record.plan().ranks(2)).peers_size(), 0);
  endpoints[3] = "h:4";
  const v1::RankDirective directive = DirectiveOf(inputs, record.plan().ranks(2));
  ASSERT_EQ(directive.peers_size(), 4);
  EXPECT_EQ(directive.peers(3).address(), "h:4");
  EXPECT_EQ(directive.rank().rank(), 0);
  EXPECT_EQ(directive.rank().epoch(), 4);
}

TEST(Directive, TheMergedTypeIsTheBaseModelsUnlessNamed) {
  v1::JobSpec spec;
  v1::Model model;
  model.set_dtype("BF16");
  EXPECT_EQ(MergeDtype(spec, model), "bfloat16");
  spec.mutable_output()->set_merge_dtype("float32");
  EXPECT_EQ(MergeDtype(spec, model), "float32");
}

}  // namespace
}  // namespace ppft::coordinator
