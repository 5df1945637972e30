#include "coordinator/job_planner.h"

#include "common/spec/spec.h"
#include "gtest/gtest.h"

namespace ppft::coordinator {
namespace {

constexpr char kConfig[] = R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 172,
  "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512,
  "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true})";

v1::JobRecord Record() {
  const spec::ParseResult parsed = spec::Parse(
      "job.yaml",
      "model: {base_model: m}\ndata: {datasets: [{path: d, type: completion}], sequence_len: 128}\ntraining: {max_steps: 3, micro_batch_size: 1}\n");
  for (const spec::FieldError& error : parsed.errors) ADD_FAILURE() << spec::ToString(error);
  v1::JobRecord record;
  *record.mutable_job()->mutable_spec() = parsed.spec;
  return record;
}

v1::ModelRecord Model() {
  v1::ModelRecord model;
  model.set_config(kConfig);
  return model;
}

OfferedDevice Device(const std::string& kind, int64_t memory_bytes = 0) {
  OfferedDevice offered{"worker-0", {}};
  offered.device.set_id(kind + ":0");
  offered.device.set_kind(kind);
  offered.device.set_memory_bytes(memory_bytes);
  return offered;
}

// What devices say of themselves reaches the plan.
TEST(JobPlannerTest, DeterministicGpusTakeMicrobatchesOneByOne) {
  const v1::JobRecord record = Record();
  const v1::ModelRecord model = Model();
  OfferedDevice gpu = Device("cuda");
  for (const bool deterministic : {false, true}) {
    gpu.device.set_deterministic(deterministic);
    const PlanAttempt attempt = JobPlanner().Plan(record, model, {gpu}, "cuda");
    ASSERT_TRUE(attempt.plan.has_value()) << attempt.message;
    EXPECT_EQ(attempt.plan->num_microbatches(), 8);
    EXPECT_EQ(attempt.plan->microbatches_per_pass(), deterministic ? 1 : 8);
  }
}

TEST(JobPlannerTest, ShortRowsNeedMemoryOnGpusWithoutCudnnsAttention) {
  const auto needed = [](const std::string& capability, const std::vector<uint32_t>& lengths) {
    v1::JobRecord record = Record();
    v1::DataSpec* const data = record.mutable_job()->mutable_spec()->mutable_data();
    data->set_sample_packing(true);
    record.mutable_job()->mutable_spec()->mutable_training()->set_micro_batch_size(4);
    v1::TokenStatistics* const train = record.mutable_prepared()->mutable_train();
    train->mutable_lengths()->Add(lengths.begin(), lengths.end());
    train->set_rows(static_cast<int64_t>(lengths.size()));
    train->set_longest_row(128);
    OfferedDevice gpu = Device("cuda");
    gpu.device.set_compute_capability(capability);
    const PlanAttempt attempt = JobPlanner().Plan(record, Model(), {gpu}, "cuda");
    EXPECT_TRUE(attempt.plan.has_value()) << attempt.message;
    return attempt.plan.has_value() ? attempt.plan->ranks(0).memory().workspace_bytes() : 0;
  };
  const std::vector<uint32_t> longs(100, 128), mixed = [&] {
    std::vector<uint32_t> lengths(200, 3);
    lengths.insert(lengths.begin(), longs.begin(), longs.end());
    return lengths;
  }();
  EXPECT_EQ(needed("9.0", longs), needed("9.0", mixed));
  EXPECT_GT(needed("8.0", mixed), needed("8.0", longs));
  EXPECT_GT(needed("8.0", longs), needed("9.0", longs));
}

// What `ppctl plan` shows is what the queue would do, on the same kind of device.
TEST(JobPlannerTest, DraftAndPlanTakeTheSameKind) {
  const v1::ModelRecord model = Model();
  for (const int rows : {1, 4096}) {
    v1::JobRecord record = Record();
    record.mutable_job()->mutable_spec()->mutable_training()->set_micro_batch_size(rows);
    const std::vector<OfferedDevice> all = {Device("cpu"), Device("cuda", int64_t{4} << 30)};
    const absl::StatusOr<PlanDraft> draft = JobPlanner().Draft(record, model, all, /*gpus_away=*/false, 1);
    ASSERT_TRUE(draft.ok()) << draft.status();
    EXPECT_EQ(draft->plan.compute(), "bf16");
    JobPlanner planner;
    const PlanAttempt attempt = planner.Plan(record, model, all, KindFor(record, all, /*gpus_away=*/false));
    EXPECT_EQ(attempt.plan.has_value(), draft->fit.ok());
    EXPECT_EQ(attempt.plan.has_value(), rows == 1) << attempt.message;
    EXPECT_EQ(attempt.message, draft->fit.message());
    if (rows > 1) {
      EXPECT_NE(attempt.message.find("it would fit with"), std::string::npos) << attempt.message;
      EXPECT_TRUE(planner.Plan(record, model, all, "cpu").plan.has_value()) << "the refusal of one kind is not that of the other";
    }
  }
}

TEST(JobPlannerTest, GpusThatAreAwayArePlannedFor) {
  const absl::StatusOr<PlanDraft> draft = JobPlanner().Draft(Record(), Model(), {Device("cpu")}, /*gpus_away=*/true, 1);
  ASSERT_TRUE(draft.ok()) << draft.status();
  EXPECT_EQ(draft->plan.compute(), "bf16");
  EXPECT_FALSE(draft->fit.ok());
  EXPECT_EQ(draft->devices_present, 0);
}

}  // namespace
}  // namespace ppft::coordinator
