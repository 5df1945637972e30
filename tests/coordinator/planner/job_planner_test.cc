#include "coordinator/job_planner.h"

#include "common/spec/spec.h"
#include "gtest/gtest.h"

namespace ppft::coordinator {
namespace {

constexpr char kConfig[] = R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 172,
  "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512,
  "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true})";

// What devices say of themselves reaches the plan.
TEST(JobPlannerTest, DeterministicGpusTakeMicrobatchesOneByOne) {
  v1::JobRecord record;
  const spec::ParseResult parsed = spec::Parse(
      "job.yaml",
      "model: {base_model: m}\ndata: {datasets: [{path: d, type: completion}], sequence_len: 128}\ntraining: {max_steps: 3, micro_batch_size: 1}\n");
  ASSERT_TRUE(parsed.errors.empty()) << spec::ToString(parsed.errors[0]);
  *record.mutable_job()->mutable_spec() = parsed.spec;
  v1::ModelRecord model;
  model.set_config(kConfig);
  OfferedDevice gpu{"worker-0", {}};
  gpu.device.set_id("cuda:0");
  gpu.device.set_kind("cuda");
  for (const bool deterministic : {false, true}) {
    gpu.device.set_deterministic(deterministic);
    const PlanAttempt attempt = JobPlanner().Plan(record, model, {gpu});
    ASSERT_TRUE(attempt.plan.has_value()) << attempt.message;
    EXPECT_EQ(attempt.plan->num_microbatches(), 8);
    EXPECT_EQ(attempt.plan->microbatches_per_pass(), deterministic ? 1 : 8);
  }
}

}  // namespace
}  // namespace ppft::coordinator
