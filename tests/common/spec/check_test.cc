// Check on finished messages, as the coordinator gets them from any client.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "common/spec/spec.h"

namespace ppft::spec {
namespace {

v1::JobSpec Good() { return Parse("job.yaml", "model: {base_model: tiny}\ndata: {datasets: [{path: ds-0123456789abcdef, type: completion}]}\n").spec; }

TEST(Check, AcceptsWhatParseMade) { EXPECT_TRUE(Check(Good()).empty()); }

TEST(Check, AnEmptyMessageIsWrongInManyPlaces) {
  std::set<std::string> fields;
  for (const v1::Violation& violation : Check(v1::JobSpec())) fields.insert(violation.field());
  for (const char* field : {"model.base_model", "data.datasets", "adapter.r", "training.learning_rate", "data.sequence_len", "name", "parallel.schedule"}) {
    EXPECT_TRUE(fields.count(field)) << field;
  }
}

TEST(Check, FindsEachWrongField) {
  struct Case {
    const char* field;
    std::function<void(v1::JobSpec*)> damage;
  };
  const std::vector<Case> cases = {
      {"adapter.r", [](v1::JobSpec* s) { s->mutable_adapter()->set_r(-5); }},
      {"adapter.lora_dropout", [](v1::JobSpec* s) { s->mutable_adapter()->set_lora_dropout(1); }},
      {"adapter.lora_alpha", [](v1::JobSpec* s) { s->mutable_adapter()->set_lora_alpha(std::numeric_limits<double>::quiet_NaN()); }},
      {"adapter.target_modules", [](v1::JobSpec* s) { s->mutable_adapter()->clear_target_modules(); }},
      {"training.learning_rate", [](v1::JobSpec* s) { s->mutable_training()->set_learning_rate(std::numeric_limits<double>::infinity()); }},
      {"training.num_epochs", [](v1::JobSpec* s) { s->mutable_training()->set_max_steps(3); }},
      {"training.num_epochs", [](v1::JobSpec* s) { s->mutable_training()->clear_num_epochs(); }},
      {"training.max_steps",
       [](v1::JobSpec* s) {
         s->mutable_training()->clear_num_epochs();
         s->mutable_training()->set_max_steps(0);
       }},
      {"training.micro_batch_size", [](v1::JobSpec* s) { s->mutable_training()->set_micro_batch_size(std::numeric_limits<int>::max()); }},
      {"training.micro_batch_size",
       [](v1::JobSpec* s) {
         s->mutable_training()->set_micro_batch_size(60000);
         s->mutable_data()->set_sequence_len(60000);
       }},
      {"data.datasets[0].path", [](v1::JobSpec* s) { s->mutable_data()->mutable_datasets(0)->set_path("a\nb"); }},
      {"data.datasets[0].field_map", [](v1::JobSpec* s) { s->mutable_data()->mutable_datasets(0)->clear_field_map(); }},
      {"model.base_model", [](v1::JobSpec* s) { s->mutable_model()->set_base_model("../../etc"); }},
      {"name", [](v1::JobSpec* s) { s->set_name("a/b"); }},
      {"name", [](v1::JobSpec* s) { s->set_name(std::string(64, 'a')); }},
      {"labels", [](v1::JobSpec* s) { (*s->mutable_labels())[""] = "x"; }},
      {"limits.stall_timeout", [](v1::JobSpec* s) { s->mutable_limits()->mutable_stall_timeout()->set_seconds(-1); }},
      {"precision.compute", [](v1::JobSpec* s) { s->mutable_precision()->set_compute("fp8"); }},
      {"parallel.schedule", [](v1::JobSpec* s) { s->mutable_parallel()->set_schedule(""); }},
      {"adapter.lora_alpha", [](v1::JobSpec* s) { s->mutable_adapter()->set_lora_alpha(16.5); }},
      {"training.learning_rate", [](v1::JobSpec* s) { s->mutable_training()->set_learning_rate(1e30); }},
      {"parallel.pipeline_parallel_size", [](v1::JobSpec* s) { s->mutable_parallel()->set_pipeline_parallel_size(-1); }},
      {"parallel.layers_per_stage[0]", [](v1::JobSpec* s) { s->mutable_parallel()->add_layers_per_stage(0); }},
      {"data.datasets[0].field_map",
       [](v1::JobSpec* s) {
         v1::DatasetSpec* dataset = s->mutable_data()->mutable_datasets(0);
         dataset->set_type("prompt_completion");
         dataset->clear_field_map();
         (*dataset->mutable_field_map())["prompt"] = (*dataset->mutable_field_map())["completion"] = "input";
       }},
      {"precision.hysteresis",
       [](v1::JobSpec* s) {
         s->mutable_precision()->set_loss_scale(1024);
         s->mutable_precision()->set_hysteresis(5);
       }},
      {"precision.min_loss_scale",
       [](v1::JobSpec* s) {
         s->mutable_precision()->set_compute("fp16");
         s->mutable_precision()->set_initial_scale_power(4);
         s->mutable_precision()->set_min_loss_scale(17);
       }},
  };
  for (const Case& c : cases) {
    v1::JobSpec spec = Good();
    c.damage(&spec);
    const auto violations = Check(spec);
    ASSERT_EQ(violations.size(), 1u) << c.field;
    EXPECT_EQ(violations[0].field(), c.field);
    EXPECT_GT(violations[0].message().size(), 10u);
  }
}

TEST(Check, WhatOlderClientsLeaveEmptyMeansTheDefault) {
  v1::JobSpec spec = Good();
  spec.mutable_parallel()->clear_cuda_graphs();
  spec.mutable_parallel()->clear_merge_micro_batches();
  EXPECT_TRUE(Check(spec).empty());
  FillNewerFields(&spec);
  EXPECT_EQ(spec.parallel().cuda_graphs(), "auto");
  EXPECT_EQ(spec.parallel().merge_micro_batches(), "auto");
  spec.mutable_parallel()->set_cuda_graphs("off");
  FillNewerFields(&spec);
  EXPECT_EQ(spec.parallel().cuda_graphs(), "off") << "what is there stays";
}

}  // namespace
}  // namespace ppft::spec
