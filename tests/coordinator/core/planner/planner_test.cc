#include "coordinator/core/planner/planner.h"

#include <algorithm>
#include <functional>

#include "absl/strings/str_cat.h"
#include "common/model/inventory.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace ppft::coordinator {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kGiB = int64_t{1} << 30;

model::ModelConfig Tiny() {  // the sizes of stories260K
  model::ModelConfig config;
  config.hidden_size = 64;
  config.intermediate_size = 172;
  config.num_layers = 5;
  config.num_attention_heads = 8;
  config.num_key_value_heads = 4;
  config.head_dim = 8;
  config.vocab_size = 512;
  config.max_position_embeddings = 512;
  config.tie_word_embeddings = true;
  return config;
}

model::ModelConfig Llama1B() {
  model::ModelConfig config;
  config.hidden_size = 2048;
  config.intermediate_size = 8192;
  config.num_layers = 16;
  config.num_attention_heads = 32;
  config.num_key_value_heads = 8;
  config.head_dim = 64;
  config.vocab_size = 128256;
  config.max_position_embeddings = 131072;
  config.tie_word_embeddings = true;
  return config;
}

v1::JobSpec Spec() {
  v1::JobSpec spec;
  spec.mutable_adapter()->set_r(8);
  for (const std::string& module : model::TargetModules()) spec.mutable_adapter()->add_target_modules(module);
  spec.mutable_data()->set_sequence_len(64);
  spec.mutable_training()->set_micro_batch_size(4);
  spec.mutable_training()->set_gradient_accumulation_steps(8);
  spec.mutable_precision()->set_compute("auto");
  spec.mutable_parallel()->set_schedule("auto");
  spec.mutable_parallel()->set_virtual_stages(1);
  spec.mutable_parallel()->set_zero_stage(1);
  return spec;
}

std::vector<PlanDevice> Workers(const std::vector<int>& slots, const std::string& kind = "cpu", int64_t memory = 8 * kGiB) {
  std::vector<PlanDevice> devices;
  for (size_t w = 0; w < slots.size(); ++w) {
    for (int d = 0; d < slots[w]; ++d) devices.push_back({absl::StrCat("worker-", w), absl::StrCat(kind, ":", d), kind, memory, 2});
  }
  return devices;
}

PlanRequest Request(const std::function<void(v1::JobSpec&)>& change = [](v1::JobSpec&) {}) {
  PlanRequest request{Spec(), Tiny(), 100, Workers({1, 1, 1, 1})};
  change(request.spec);
  return request;
}

std::vector<int> LayersOf(const v1::Plan& plan) {
  std::vector<int> layers;
  for (const v1::StagePlan& stage : plan.stages()) layers.push_back(stage.num_layers());
  return layers;
}

std::vector<std::string> PlacesOf(const v1::Plan& plan) {
  std::vector<std::string> places;
  for (const v1::RankPlan& rank : plan.ranks()) places.push_back(absl::StrCat(rank.worker(), "/", rank.device()));
  return places;
}

std::string ErrorOf(const PlanRequest& request) { return std::string(PlanJob(request).status().message()); }

TEST(PlannerTest, AutoOnCpuIsOneStage) {
  absl::StatusOr<v1::Plan> plan = PlanJob(Request());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->pipeline_parallel_size(), 1);
  EXPECT_EQ(plan->data_parallel_size(), 1);
  EXPECT_EQ(plan->schedule(), "1f1b");
  EXPECT_EQ(plan->compute(), "fp32");
  EXPECT_EQ(plan->num_microbatches(), 8);
  EXPECT_EQ(plan->microbatch_tokens(), 256);
  EXPECT_EQ(plan->total_steps(), 100);
  EXPECT_EQ(plan->threads_per_rank(), 2);
  EXPECT_EQ(plan->predicted_bubble_ratio(), 0);
  EXPECT_EQ(plan->ranks(0).program().substr(0, 16), "0F0 0B0 0F1 0B1 ");
  EXPECT_THAT(plan->explanation(), HasSubstr("1 stage with all 5 layers"));
}

TEST(PlannerTest, TwoStagesOverTwoWorkers) {
  const PlanRequest request = Request([](v1::JobSpec& spec) { spec.mutable_parallel()->set_pipeline_parallel_size(2); });
  absl::StatusOr<v1::Plan> plan = PlanJob(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(LayersOf(*plan), ElementsAre(3, 2));
  EXPECT_THAT(PlacesOf(*plan), ElementsAre("worker-0/cpu:0", "worker-1/cpu:0"));
  EXPECT_TRUE(plan->stages(0).has_embedding() && !plan->stages(0).has_head());
  EXPECT_TRUE(!plan->stages(1).has_embedding() && plan->stages(1).has_head());
  EXPECT_EQ(plan->stages(1).first_layer(), 3);
  EXPECT_EQ(plan->ranks(0).peak_activations(), 2);
  EXPECT_EQ(plan->ranks(1).peak_activations(), 1);
  EXPECT_GT(plan->predicted_bubble_ratio(), 0.1);
  EXPECT_LT(plan->predicted_bubble_ratio(), 0.3);
  EXPECT_EQ(plan->ranks(0).program().substr(0, 12), "0F0 0SEND_F0");
  for (const v1::StagePlan& stage : plan->stages()) {
    EXPECT_GT(stage.forward_cost(), 0);
    EXPECT_GT(stage.backward_cost(), 0);
    EXPECT_GT(stage.weight_bytes(), 0);
    EXPECT_GT(stage.adapter_bytes(), 0);
    EXPECT_GT(stage.activation_bytes(), 0);
  }
  EXPECT_EQ(PlanJob(request)->SerializeAsString(), plan->SerializeAsString());
}

TEST(PlannerTest, EveryLayoutOfTheMeshIsWhole) {
  for (int dp : {1, 2}) {
    for (int pp = 1; pp <= 4; ++pp) {
      for (const char* schedule : {"gpipe", "1f1b", "interleaved_1f1b", "auto"}) {
        const int v = schedule == std::string("interleaved_1f1b") ? 2 : 1;
        if (pp * v > 5) continue;
        PlanRequest request = Request([&](v1::JobSpec& spec) {
          spec.mutable_parallel()->set_data_parallel_size(dp);
          spec.mutable_parallel()->set_pipeline_parallel_size(pp);
          spec.mutable_parallel()->set_virtual_stages(v);
          spec.mutable_parallel()->set_schedule(schedule);
        });
        request.devices = Workers({3, 3, 2});
        absl::StatusOr<v1::Plan> plan = PlanJob(request);
        ASSERT_TRUE(plan.ok()) << dp << "x" << pp << " " << schedule << ": " << plan.status();
        EXPECT_EQ(plan->ranks_size(), dp * pp);
        EXPECT_EQ(plan->stages_size(), pp * v);
        EXPECT_TRUE(CheckPlan(*plan, 5).ok());
      }
    }
  }
}

TEST(PlannerTest, TheHeadCountsInThePartition) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({4}, "cuda", 140 * kGiB)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(4);
  absl::StatusOr<v1::Plan> plan = PlanJob(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(LayersOf(*plan), ElementsAre(5, 5, 5, 1));
  EXPECT_EQ(plan->compute(), "bf16");
  // A GPU does the head's products faster than FLOPs say, and waits for memory in the layers.
  request.spec.mutable_parallel()->set_pipeline_parallel_size(2);
  EXPECT_THAT(LayersOf(*PlanJob(request)), ElementsAre(9, 7));
  request.devices = Workers({4}, "cpu", 140 * kGiB);
  EXPECT_THAT(LayersOf(*PlanJob(request)), ElementsAre(10, 6));
  request.devices = Workers({4}, "cuda", 140 * kGiB);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(4);
  // Where only a few rows reach the head, it weighs less.
  request.supervised_ratio = 0.1;
  EXPECT_THAT(LayersOf(*PlanJob(request)), ElementsAre(4, 4, 4, 4));
  request.supervised_ratio = 0;
  EXPECT_THAT(ErrorOf(request), HasSubstr("supervised_ratio"));
}

TEST(PlannerTest, AutoTakesTheSmallestPipelineThatFits) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({4}, "cuda", 140 * kGiB)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_training()->set_micro_batch_size(1);
  request.spec.mutable_parallel()->set_merge_micro_batches("off");  // what is merged takes less where there is less
  EXPECT_EQ(PlanJob(request)->pipeline_parallel_size(), 1);
  const int64_t whole = PlanJob(request)->ranks(0).peak_bytes();
  request.devices = Workers({4}, "cuda", whole - 1);
  absl::StatusOr<v1::Plan> plan = PlanJob(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const int stages = plan->pipeline_parallel_size();
  EXPECT_GT(stages, 1);
  for (const v1::RankPlan& rank : plan->ranks()) EXPECT_LT(rank.peak_bytes(), whole);
  // Fewer would not do: each has communicators to hold, too.
  request.spec.mutable_parallel()->set_pipeline_parallel_size(stages - 1);
  EXPECT_FALSE(PlanJob(request).ok());
}

TEST(PlannerTest, CpuSlotsAreNotTakenBesideGpus) {
  PlanRequest request = Request([](v1::JobSpec& spec) { spec.mutable_parallel()->set_pipeline_parallel_size(2); });
  EXPECT_EQ(PlanJob(request)->compute(), "fp32");
  request.devices.push_back({"gpu", "cuda:0", "cuda", 80 * kGiB, 0});
  const absl::StatusOr<PlanDraft> draft = DraftPlan(request);
  EXPECT_EQ(draft->fit.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(draft->devices_present, 1);
  EXPECT_EQ(draft->plan.compute(), "bf16");
  EXPECT_THAT(std::string(draft->fit.message()),
              AllOf(HasSubstr("needs 2 cuda devices"), HasSubstr("1 is there"), HasSubstr("lower parallel.pipeline_parallel_size"), Not(HasSubstr("free"))));
  request.devices.push_back({"gpu", "cuda:1", "cuda", 80 * kGiB, 0});
  EXPECT_THAT(PlacesOf(*PlanJob(request)), ElementsAre("gpu/cuda:0", "gpu/cuda:1"));
  // Too large for the GPUs, which the CPUs beside them could carry.
  request.devices[4].memory_bytes = request.devices[5].memory_bytes = kGiB;
  request.spec.mutable_parallel()->set_pipeline_parallel_size(1);
  request.spec.mutable_training()->set_micro_batch_size(4096);
  EXPECT_EQ(PlanJob(request).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(ErrorOf(request), AllOf(HasSubstr("the largest cuda device has 1.0 GiB: it would fit with"), Not(HasSubstr("free"))));
}

TEST(PlannerTest, TheKindMayBeGiven) {
  PlanRequest request = Request();
  request.kind = "cuda";
  EXPECT_EQ(PlanJob(request).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(ErrorOf(request), AllOf(HasSubstr("needs 1 cuda device ("), HasSubstr("0 are there: it waits for more"), Not(HasSubstr("lower"))));
  request.spec.mutable_parallel()->set_data_parallel_size(7);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(1);
  EXPECT_THAT(ErrorOf(request), HasSubstr("it waits for more; lower parallel.data_parallel_size to need fewer"));
  request.spec.mutable_parallel()->set_pipeline_parallel_size(2);
  EXPECT_THAT(ErrorOf(request), HasSubstr("lower parallel.pipeline_parallel_size or parallel.data_parallel_size to need fewer"));
  request.spec.mutable_parallel()->clear_pipeline_parallel_size();
  request.spec.mutable_parallel()->clear_data_parallel_size();
  request.devices.push_back({"gpu", "cuda:0", "cuda", 80 * kGiB, 0});
  request.kind = "cpu";
  EXPECT_EQ(PlanJob(request)->compute(), "fp32");
}

TEST(PlannerTest, ThreadsAreTheLeastOfTheChosenDevices) {
  PlanRequest request = Request([](v1::JobSpec& spec) { spec.mutable_parallel()->set_pipeline_parallel_size(2); });
  request.devices = Workers({1, 1});
  request.devices[0].threads = 8;
  request.devices[1].threads = 3;
  EXPECT_EQ(PlanJob(request)->threads_per_rank(), 3);
}

TEST(PlannerTest, AutoScheduleFollowsStagesAndMicrobatches) {
  const auto schedule = [](int pp, int v, int m) {
    return PlanJob(Request([&](v1::JobSpec& spec) {
             spec.mutable_parallel()->set_pipeline_parallel_size(pp);
             spec.mutable_parallel()->set_virtual_stages(v);
             spec.mutable_training()->set_gradient_accumulation_steps(m);
           }))
        ->schedule();
  };
  EXPECT_EQ(schedule(4, 1, 4), "1f1b");
  EXPECT_EQ(schedule(4, 1, 3), "gpipe");
  EXPECT_EQ(schedule(2, 2, 3), "interleaved_1f1b");
}

TEST(PlannerTest, GlobalBatchGivesTheMicrobatches) {
  const auto plan = [](int global, int dp) {
    return PlanJob(Request([&](v1::JobSpec& spec) {
      spec.mutable_training()->set_global_batch_size(global);
      spec.mutable_parallel()->set_data_parallel_size(dp);
    }));
  };
  EXPECT_EQ(plan(48, 1)->num_microbatches(), 12);
  EXPECT_EQ(plan(48, 2)->num_microbatches(), 6);
  EXPECT_THAT(std::string(plan(50, 1).status().message()), AllOf(HasSubstr("training.global_batch_size"), HasSubstr("multiple of 4")));
  EXPECT_THAT(std::string(plan(2, 1).status().message()), HasSubstr("training.global_batch_size"));
}

TEST(PlannerTest, ContradictionsNameFieldNumbersAndRemedy) {
  struct Case {
    const char* what;
    std::function<void(v1::JobSpec&)> change;
    std::vector<std::string> words;
  };
  const Case cases[] = {
      {"more stages than layers",
       [](v1::JobSpec& s) { s.mutable_parallel()->set_pipeline_parallel_size(9); },
       {"parallel.pipeline_parallel_size: ", "9 stages", "5 layers"}},
      {"layers do not add up",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->set_pipeline_parallel_size(2);
         s.mutable_parallel()->add_layers_per_stage(1);
         s.mutable_parallel()->add_layers_per_stage(1);
       },
       {"parallel.layers_per_stage: [1, 1] adds up to 2", "5 layers"}},
      {"too few numbers",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->set_pipeline_parallel_size(2);
         s.mutable_parallel()->add_layers_per_stage(5);
       },
       {"parallel.layers_per_stage: [5] has 1 number for 2 stages"}},
      {"a stage without a layer",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->set_pipeline_parallel_size(2);
         s.mutable_parallel()->add_layers_per_stage(5);
         s.mutable_parallel()->add_layers_per_stage(0);
       },
       {"parallel.layers_per_stage: [5, 0]", "at least 1"}},
      {"too few micro-batches, interleaved",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->set_pipeline_parallel_size(2);
         s.mutable_parallel()->set_virtual_stages(2);
         s.mutable_parallel()->set_schedule("interleaved_1f1b");
         s.mutable_training()->set_gradient_accumulation_steps(1);
       },
       {"training.gradient_accumulation_steps: ", "interleaved_1f1b", "(1) must be at least pipeline_parallel_size (2)", "raise"}},
      {"too few micro-batches, 1f1b",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->set_pipeline_parallel_size(4);
         s.mutable_parallel()->set_schedule("1f1b");
         s.mutable_training()->set_gradient_accumulation_steps(2);
       },
       {"training.gradient_accumulation_steps: ", "(2) must be at least pipeline_parallel_size (4)"}},
      {"virtual stages without interleaving",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->set_virtual_stages(2);
         s.mutable_parallel()->set_schedule("gpipe");
       },
       {"parallel.virtual_stages: 2 virtual stages need schedule: interleaved_1f1b"}},
      {"interleaving without virtual stages", [](v1::JobSpec& s) { s.mutable_parallel()->set_schedule("interleaved_1f1b"); }, {"parallel.virtual_stages: "}},
      {"a plan too large to send",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->set_pipeline_parallel_size(4);
         s.mutable_training()->set_gradient_accumulation_steps(60000);
       },
       {"training.gradient_accumulation_steps: 60000", "larger micro_batch_size"}},
      {"a micro-batch beyond 32 bits",
       [](v1::JobSpec& s) {
         s.mutable_training()->set_micro_batch_size(65536);
         s.mutable_data()->set_sequence_len(1 << 20);
       },
       {"training.micro_batch_size: "}},
  };
  for (const Case& c : cases) {
    const PlanRequest request = Request(c.change);
    EXPECT_EQ(PlanJob(request).status().code(), absl::StatusCode::kInvalidArgument) << c.what;
    EXPECT_FALSE(CheckLayout(request.spec, request.config).empty()) << c.what;
    for (const std::string& word : c.words) EXPECT_THAT(ErrorOf(request), HasSubstr(word)) << c.what;
  }
}

TEST(PlannerTest, AllContradictionsAtOnce) {
  const PlanRequest request = Request([](v1::JobSpec& spec) {
    spec.mutable_parallel()->set_pipeline_parallel_size(2);
    spec.mutable_parallel()->set_schedule("1f1b");
    spec.mutable_parallel()->add_layers_per_stage(1);
    spec.mutable_training()->set_gradient_accumulation_steps(1);
  });
  EXPECT_EQ(CheckLayout(request.spec, request.config).size(), 3u);
  const std::string message = ErrorOf(request);
  EXPECT_EQ(std::count(message.begin(), message.end(), '\n'), 2);
}

TEST(PlannerTest, LayersPerStageNamesTheSizeOfThePipeline) {
  const PlanRequest request = Request([](v1::JobSpec& spec) {
    for (int n : {2, 2, 1}) spec.mutable_parallel()->add_layers_per_stage(n);
  });
  absl::StatusOr<v1::Plan> plan = PlanJob(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->pipeline_parallel_size(), 3);
  EXPECT_THAT(LayersOf(*plan), ElementsAre(2, 2, 1));
}

TEST(PlannerTest, TooFewDevicesWaitsAndStillShowsThePlan) {
  PlanRequest request = Request([](v1::JobSpec& spec) { spec.mutable_parallel()->set_pipeline_parallel_size(4); });
  request.devices = Workers({2, 1});
  EXPECT_EQ(PlanJob(request).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(ErrorOf(request), AllOf(HasSubstr("needs 4 devices"), HasSubstr("3 are there")));
  absl::StatusOr<PlanDraft> draft = DraftPlan(request);
  ASSERT_TRUE(draft.ok()) << draft.status();
  EXPECT_EQ(draft->devices_needed, 4);
  EXPECT_EQ(draft->devices_present, 3);
  EXPECT_EQ(draft->plan.stages_size(), 4);
  EXPECT_EQ(draft->plan.ranks(0).worker(), "");
  EXPECT_FALSE(CheckPlan(draft->plan, 5).ok());
  request.devices.clear();
  EXPECT_THAT(ErrorOf(request), HasSubstr("0 are there"));
}

// Obeys the first remedy of a message: "key: N".
int SettingIn(const absl::Status& status, const std::string& key) {
  const std::string message(status.message());
  const size_t at = message.find(key + ": ");
  return at == std::string::npos ? -1 : std::stoi(message.substr(at + key.size() + 2));
}

TEST(PlannerTest, OutOfMemoryNamesSettingsThatWouldFit) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({4}, "cuda", 48 * kGiB)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_training()->set_micro_batch_size(16);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(2);
  request.spec.mutable_parallel()->set_schedule("gpipe");
  const absl::Status status = PlanJob(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("pipeline rank 0 needs about"), HasSubstr("48.0 GiB"), HasSubstr("fit with parallel.schedule: 1f1b")));
  PlanRequest remedy = request;
  remedy.spec.mutable_training()->set_micro_batch_size(SettingIn(status, "training.micro_batch_size"));
  EXPECT_TRUE(PlanJob(remedy).ok()) << status << PlanJob(remedy).status();
  remedy.spec.mutable_training()->set_micro_batch_size(1 + remedy.spec.training().micro_batch_size());
  EXPECT_FALSE(PlanJob(remedy).ok()) << status;
}

TEST(PlannerTest, OutOfMemoryNamesACombinationWhenNoSingleSettingSuffices) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({4}, "cuda", 6 * kGiB)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_training()->set_micro_batch_size(16);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(2);
  request.spec.mutable_parallel()->set_schedule("gpipe");
  const absl::Status status = PlanJob(request).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("parallel.schedule: 1f1b with training.micro_batch_size: "));
  request.spec.mutable_parallel()->set_schedule("1f1b");
  request.spec.mutable_training()->set_micro_batch_size(SettingIn(status, "training.micro_batch_size"));
  EXPECT_TRUE(PlanJob(request).ok()) << status << PlanJob(request).status();
  request.devices = Workers({4}, "cuda", kGiB / 2);
  EXPECT_THAT(ErrorOf(request), AllOf(HasSubstr("devices with more memory"), Not(HasSubstr("it would fit"))));
}

TEST(PlannerTest, GPipeHoldsMoreThan1F1B) {
  const auto bytes = [](const char* schedule) {
    PlanRequest request{Spec(), Llama1B(), 10, Workers({2})};
    request.devices[0].memory_bytes = request.devices[1].memory_bytes = 0;  // not known: taken as enough
    request.spec.mutable_parallel()->set_pipeline_parallel_size(2);
    request.spec.mutable_parallel()->set_schedule(schedule);
    return PlanJob(request)->ranks(0).peak_bytes();
  };
  EXPECT_GT(bytes("gpipe"), bytes("1f1b"));
}

TEST(PlacementTest, OneWorkerThenReplicasThenSpread) {
  const auto places = [](const std::vector<int>& slots, int dp, int pp) {
    std::vector<PlanDevice> devices = Workers(slots);
    std::reverse(devices.begin(), devices.end());  // the order of the input does not matter
    std::vector<std::string> out;
    for (const PlanDevice& device : ChooseDevices(devices, dp, pp)) out.push_back(absl::StrCat(device.worker.substr(7), device.id.substr(4)));
    return out;
  };
  EXPECT_THAT(places({4, 2, 3}, 1, 2), ElementsAre("10", "11"));                    // the worker with the least room that suffices
  EXPECT_THAT(places({2, 3, 2}, 2, 2), ElementsAre("00", "01", "20", "21"));        // a replica per worker
  EXPECT_THAT(places({1, 3, 2}, 1, 5), ElementsAre("10", "11", "12", "20", "21"));  // neighbours together
  EXPECT_THAT(places({1, 1}, 1, 2), ElementsAre("00", "10"));
  EXPECT_TRUE(places({1, 1}, 1, 3).empty());
  std::vector<PlanDevice> many = Workers({12});
  std::swap(many[2], many[10]);
  EXPECT_EQ(Sorted(many)[2].id, "cpu:2");
}

TEST(CheckPlanTest, FindsEveryMutation) {
  const auto plan = [] {
    return *PlanJob(Request([](v1::JobSpec& spec) {
      spec.mutable_parallel()->set_pipeline_parallel_size(2);
      spec.mutable_parallel()->set_data_parallel_size(2);
    }));
  };
  ASSERT_TRUE(CheckPlan(plan(), 5).ok());
  const std::pair<const char*, std::function<void(v1::Plan&)>> mutations[] = {
      {"pipeline", [](v1::Plan& p) { p.set_pipeline_parallel_size(0); }},
      {"micro-batches", [](v1::Plan& p) { p.set_num_microbatches(9); }},
      {"merged micro-batches", [](v1::Plan& p) { p.set_microbatches_per_pass(2); }},
      {"more merged than there are", [](v1::Plan& p) { p.set_microbatches_per_pass(9); }},
      {"stages", [](v1::Plan& p) { p.mutable_stages()->RemoveLast(); }},
      {"layers", [](v1::Plan& p) { p.mutable_stages(0)->set_num_layers(2); }},
      {"last layers", [](v1::Plan& p) { p.mutable_stages(1)->set_num_layers(1); }},
      {"head", [](v1::Plan& p) { p.mutable_stages(0)->set_has_head(true); }},
      {"rank", [](v1::Plan& p) { p.mutable_ranks(1)->set_rank(0); }},
      {"rank's stages", [](v1::Plan& p) { p.mutable_ranks(1)->set_stages(0, 0); }},
      {"ranks", [](v1::Plan& p) { p.mutable_ranks()->RemoveLast(); }},
      {"device", [](v1::Plan& p) { p.mutable_ranks(3)->set_device(""); }},
      {"shared device", [](v1::Plan& p) { p.mutable_ranks(3)->set_worker(p.ranks(2).worker()); }},
      {"peak", [](v1::Plan& p) { p.mutable_ranks(3)->set_peak_activations(7); }},
      {"text", [](v1::Plan& p) { p.mutable_ranks(2)->set_program("0F0 hello"); }},
      {"programs exchanged", [](v1::Plan& p) { p.mutable_ranks(2)->mutable_program()->swap(*p.mutable_ranks(3)->mutable_program()); }},
      {"an action lost", [](v1::Plan& p) { p.mutable_ranks(3)->mutable_program()->erase(0, 9); }},
  };
  for (const auto& [what, mutate] : mutations) {
    v1::Plan broken = plan();
    mutate(broken);
    const absl::Status status = CheckPlan(broken, 5);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << what;
  }
  EXPECT_FALSE(CheckPlan(plan(), 6).ok());
}

v1::Plan PlanOf(int zero, const std::string& checkpointing) {
  v1::JobSpec spec = Spec();
  spec.mutable_training()->set_micro_batch_size(8);
  spec.mutable_data()->set_sequence_len(2048);
  spec.mutable_parallel()->set_pipeline_parallel_size(2);
  spec.mutable_parallel()->set_data_parallel_size(4);
  spec.mutable_parallel()->set_zero_stage(zero);
  spec.mutable_parallel()->set_activation_checkpointing(checkpointing);
  return DraftPlan({spec, Llama1B(), 10, Workers({8}, "cpu", 0)})->plan;
}

TEST(Memory, WhatReplicasShareAndWhatIsMadeAgainIsSubtracted) {
  const v1::Plan whole = PlanOf(0, "none");
  const int64_t adapter = whole.stages(0).adapter_bytes();  // masters, gradients and two moments of the same size
  const int64_t layers = whole.stages(0).num_layers();
  EXPECT_EQ(PlanOf(1, "none").stages(0).adapter_bytes(), adapter / 4 * 2 + adapter / 2 / 4);
  EXPECT_EQ(PlanOf(2, "none").stages(0).adapter_bytes(), adapter / 4 + adapter / 4 / 4 + 2 * (adapter / 4 / layers) + adapter / 2 / 4);
  EXPECT_EQ(PlanOf(2, "none").stages(0).weight_bytes(), whole.stages(0).weight_bytes());
  EXPECT_LT(PlanOf(3, "none").stages(0).weight_bytes(), whole.stages(0).weight_bytes());
  EXPECT_LT(PlanOf(3, "none").ranks(0).peak_bytes(), whole.ranks(0).peak_bytes());
  const int64_t none = whole.stages(0).activation_bytes();
  const v1::Plan selective = PlanOf(0, "selective");
  EXPECT_LT(selective.stages(0).activation_bytes() / selective.stages(0).num_layers(), none / layers / 2);
  const v1::Plan full = PlanOf(0, "full");  // dearer layers: the head weighs less, and the cut may move
  const int64_t tokens = 8 * 2048;
  EXPECT_EQ(full.stages(0).activation_bytes(), full.stages(0).num_layers() * tokens * 2048 * 4 + tokens * 32 + 256);  // and ids, positions and targets
  EXPECT_LT(full.ranks(0).peak_bytes(), whole.ranks(0).peak_bytes());
  EXPECT_GT(full.stages(0).backward_cost() / full.stages(0).num_layers(), 1.4 * whole.stages(0).backward_cost() / layers);
}

TEST(Memory, ARanksPartsAddUp) {
  const v1::Plan plan = PlanOf(1, "selective");
  for (const v1::RankPlan& rank : plan.ranks()) {
    const v1::MemoryEstimate& m = rank.memory();
    EXPECT_EQ(rank.peak_bytes(), m.weight_bytes() + m.adapter_bytes() + m.activation_bytes() + m.workspace_bytes() + m.transfer_bytes() + m.runtime_bytes());
    EXPECT_EQ(m.activation_bytes(), rank.peak_activations() * plan.stages(rank.pipeline_rank()).activation_bytes());
    EXPECT_GT(m.transfer_bytes(), 0);
  }
  EXPECT_EQ(plan.activation_checkpointing(), "selective");
}

model::ModelConfig Llama8B() {
  model::ModelConfig config = Llama1B();
  config.hidden_size = 4096;
  config.intermediate_size = 14336;
  config.num_layers = 32;
  config.head_dim = 128;
  config.tie_word_embeddings = false;
  return config;
}

// Peaks of LibTorch's allocator on H200s for r = 16 on all linears in bf16 (tests/gpu/service_run).
TEST(Memory, MeasuredPeaksAreWithinATenth) {
  struct Case {
    model::ModelConfig config;
    int rows, length, microbatches;
    std::string merge;
    std::vector<int> layers;  // by stage
    std::vector<double> gib;
  };
  const Case cases[] = {
      {Llama1B(), 8, 2048, 1, "auto", {16}, {16.18}},          {Llama1B(), 1, 512, 8, "off", {16}, {3.17}},   {Llama1B(), 1, 512, 8, "auto", {16}, {6.44}},
      {Llama1B(), 2, 2048, 16, "auto", {10, 6}, {6.01, 3.17}}, {Llama8B(), 4, 2048, 1, "auto", {32}, {40.0}},
  };
  for (const Case& c : cases) {
    v1::JobSpec spec = Spec();
    spec.mutable_adapter()->set_r(16);
    spec.mutable_data()->set_sequence_len(c.length);
    spec.mutable_training()->set_micro_batch_size(c.rows);
    spec.mutable_training()->set_gradient_accumulation_steps(c.microbatches);
    spec.mutable_parallel()->set_pipeline_parallel_size(static_cast<int>(c.layers.size()));
    for (const int layers : c.layers) spec.mutable_parallel()->add_layers_per_stage(layers);
    spec.mutable_parallel()->set_merge_micro_batches(c.merge);
    const absl::StatusOr<v1::Plan> plan = PlanJob({spec, c.config, 10, Workers({2}, "cuda", 140 * kGiB)});
    ASSERT_TRUE(plan.ok()) << plan.status();
    for (size_t rank = 0; rank < c.gib.size(); ++rank) {
      const v1::RankPlan& planned = plan->ranks(static_cast<int>(rank));
      const double gib = static_cast<double>(planned.peak_bytes() - planned.memory().runtime_bytes()) / kGiB;
      EXPECT_GT(gib, 0.9 * c.gib[rank]) << plan->explanation();
      EXPECT_LT(gib, 1.1 * c.gib[rank]) << plan->explanation();
    }
  }
}

// A short step needs less than the export; a usual one hides it.
TEST(Memory, AnExportHasRoom) {
  const auto planned = [](int length, bool merged, bool verify) {
    v1::JobSpec spec = Spec();
    spec.mutable_data()->set_sequence_len(length);
    spec.mutable_training()->set_micro_batch_size(1);
    spec.mutable_parallel()->set_pipeline_parallel_size(1);
    spec.mutable_parallel()->set_merge_micro_batches("off");
    spec.mutable_output()->clear_formats();
    spec.mutable_output()->add_formats("adapter");
    if (merged) spec.mutable_output()->add_formats("merged");
    spec.mutable_output()->set_verify(verify);
    model::ModelConfig config = Llama8B();
    config.vocab_size = 1000000;
    const absl::StatusOr<v1::Plan> plan = PlanJob({spec, config, 10, Workers({1}, "cuda", 140 * kGiB)});
    EXPECT_TRUE(plan.ok()) << plan.status();
    return plan->ranks(0).memory();
  };
  const auto spare = [](const v1::MemoryEstimate& memory) { return memory.activation_bytes() + memory.workspace_bytes(); };
  const int64_t matrix = int64_t{14336} * 4096 * (4 + 2);       // in fp32, and narrowed
  const int64_t logits = int64_t{64} * 1000000 * (4 + 2);       // of the probe
  const v1::MemoryEstimate neither = planned(8, false, false);  // eight tokens a step
  EXPECT_GT(spare(planned(8, true, false)), spare(neither) + matrix / 2);
  EXPECT_GT(spare(planned(8, false, true)), spare(neither) + logits / 2);
  EXPECT_EQ(planned(8, true, true).weight_bytes(), neither.weight_bytes()) << "the trained model is gone when the merged one is read back";
  EXPECT_EQ(planned(2048, true, true).SerializeAsString(), planned(2048, false, false).SerializeAsString());
}

// On GPUs p + 1 messages a channel, however soon the simulated peer takes them; on CPUs what is under way.
TEST(Memory, MessagesThatTransportHoldsCount) {
  v1::JobSpec spec = Spec();
  spec.mutable_data()->set_sequence_len(2048);
  spec.mutable_training()->set_micro_batch_size(1);
  spec.mutable_training()->set_gradient_accumulation_steps(16);
  spec.mutable_precision()->set_compute("fp32");
  spec.mutable_parallel()->set_pipeline_parallel_size(4);
  const auto messages = [&](const std::string& kind) {
    const v1::Plan plan = *PlanJob({spec, Llama1B(), 10, Workers({4}, kind, 140 * kGiB)});
    return plan.ranks(1).memory().transfer_bytes() / (int64_t{2048} * 2048 * 4);
  };
  EXPECT_GE(messages("cuda"), 2 * 5 + 2);
  EXPECT_LT(messages("cpu"), 2 * 5);
}

TEST(Memory, EveryStageOfARankHasBuffersOfItsOwn) {
  const auto plan = [](int virtual_stages) {
    v1::JobSpec spec = Spec();
    spec.mutable_data()->set_sequence_len(2048);
    spec.mutable_parallel()->set_pipeline_parallel_size(2);
    spec.mutable_parallel()->set_virtual_stages(virtual_stages);
    return *PlanJob({spec, Llama1B(), 10, Workers({2}, "cuda", 0)});
  };
  EXPECT_GT(plan(2).ranks(0).memory().workspace_bytes() - plan(1).ranks(0).memory().workspace_bytes(), kGiB / 8);
}

TEST(Memory, ShortRowsNeedLessWhereRoomIsMadeForWhatComes) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({1}, "cpu", 0)};
  request.spec.mutable_data()->set_sequence_len(2048);
  const int64_t unknown = PlanJob(request)->ranks(0).memory().activation_bytes();
  request.longest_row = 512;
  const int64_t shorter = PlanJob(request)->ranks(0).memory().activation_bytes();
  EXPECT_NEAR(static_cast<double>(shorter) * 4, static_cast<double>(unknown), 1e-3 * static_cast<double>(unknown));
  request.spec.mutable_data()->set_sample_packing(true);  // bins are filled up whatever the rows
  EXPECT_EQ(PlanJob(request)->ranks(0).memory().activation_bytes(), unknown);
  request.spec.mutable_data()->set_sample_packing(false);
  const auto on_gpu = [&](int64_t longest_row) {
    request.longest_row = longest_row;
    request.devices = Workers({1}, "cuda", 0);
    return PlanJob(request)->ranks(0).memory().activation_bytes();
  };
  EXPECT_EQ(on_gpu(512), on_gpu(0));
}

TEST(Memory, FlashAttentionNeedsRoomForEveryDocument) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({1}, "cuda", 0)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_data()->set_sample_packing(true);
  request.spec.mutable_training()->set_micro_batch_size(8);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(1);
  const auto workspace = [&](bool flash, bool deterministic, int64_t documents) {
    request.devices[0].flash = flash;
    request.devices[0].deterministic = deterministic;
    request.documents = documents;
    return PlanJob(request)->ranks(0).memory().workspace_bytes();
  };
  const int64_t cudnn = workspace(false, false, 512);
  // Bytes beyond those, without what rounding of blocks adds.
  const auto more = [&](bool deterministic, int64_t documents) { return static_cast<double>(workspace(true, deterministic, documents) - cudnn) / 1.03; };
  EXPECT_EQ(workspace(false, false, 8), cudnn);
  // Passes are captured, which holds it twice. 16,384 rows of 32 heads of 64: dq's sums with their rows' own, dk and dv for every query head, dq, dk, dv.
  const double tokens = 16384, parts = tokens * 2 * (2 * 2048 + 3072);
  EXPECT_NEAR(more(false, 8), 2 * ((tokens + 128 * 8) * 32 * 65 * 4 + parts), 2);
  EXPECT_NEAR(more(false, 300), 2 * ((tokens + 128 * 512) * 32 * 65 * 4 + parts), 2) << "tables have room for a power of two";
  EXPECT_EQ(workspace(true, false, 0), workspace(true, false, 8)) << "one a row where nothing is known";
  EXPECT_NEAR(more(true, 1), 2 * ((tokens + 128) * 32 * (5 * 64 + 1) * 4 + parts), 2) << "148 blocks over 32 heads of one document";
  EXPECT_EQ(workspace(true, true, 8), workspace(true, false, 8));
}

TEST(Memory, AGpuWithFlashDoesNotStandInTheWayOfOthers) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({1, 1}, "cuda", 0)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_training()->set_micro_batch_size(8);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(1);
  const int64_t needed = PlanJob(request)->ranks(0).peak_bytes();
  request.devices = Workers({1, 1}, "cuda", needed);
  request.devices[0].flash = true;
  const absl::StatusOr<v1::Plan> plan = PlanJob(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->ranks(0).worker(), request.devices[1].worker);
  EXPECT_EQ(plan->ranks(0).peak_bytes(), needed);
  request.devices[1].flash = true;
  EXPECT_EQ(PlanJob(request).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(Checkpointing, AutoIsTheLeastThatFits) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({4}, "cuda", 140 * kGiB)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_training()->set_micro_batch_size(8);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(1);
  const auto bytes = [&](const char* word) {
    PlanRequest fixed = request;
    fixed.spec.mutable_parallel()->set_activation_checkpointing(word);
    return PlanJob(fixed)->ranks(0).peak_bytes();
  };
  const int64_t none = bytes("none"), selective = bytes("selective"), full = bytes("full");
  ASSERT_GT(none, selective);
  ASSERT_GT(selective, full);
  request.spec.mutable_parallel()->set_activation_checkpointing("auto");
  for (const auto& [memory, word] : std::vector<std::pair<int64_t, std::string>>{{none, "none"}, {none - 1, "selective"}, {selective - 1, "full"}}) {
    request.devices = Workers({4}, "cuda", memory);
    const absl::StatusOr<v1::Plan> plan = PlanJob(request);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(plan->activation_checkpointing(), word);
    EXPECT_EQ(plan->explanation().find("the least that fits") != std::string::npos, word != "none");
  }
  // What the user asks for is not replaced.
  request.spec.mutable_parallel()->set_activation_checkpointing("none");
  EXPECT_EQ(PlanJob(request).status().code(), absl::StatusCode::kResourceExhausted);
  // Nothing fits: the message starts from the most sparing way.
  request.spec.mutable_parallel()->set_activation_checkpointing("auto");
  request.devices = Workers({4}, "cuda", full - 1);
  EXPECT_THAT(ErrorOf(request), AllOf(HasSubstr("it would fit with"), Not(HasSubstr("activation_checkpointing"))));
  EXPECT_EQ(DraftPlan(request)->plan.activation_checkpointing(), "full");
  // Fewer devices before less recomputation.
  request.spec.mutable_parallel()->set_pipeline_parallel_size(0);
  request.devices = Workers({4}, "cuda", selective - 1);
  EXPECT_EQ(PlanJob(request)->pipeline_parallel_size(), 1);
}

PlanRequest SmallMicrobatches(int rows, int length, int microbatches) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({2}, "cuda", 140 * kGiB)};
  request.spec.mutable_data()->set_sequence_len(length);
  request.spec.mutable_training()->set_micro_batch_size(rows);
  request.spec.mutable_training()->set_gradient_accumulation_steps(microbatches);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(1);
  request.spec.mutable_parallel()->set_merge_micro_batches("auto");
  return request;
}

int Merged(const PlanRequest& request) {
  const absl::StatusOr<v1::Plan> plan = PlanJob(request);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return plan.ok() ? plan->microbatches_per_pass() : -1;
}

TEST(Merging, FillsAPassAndNoMore) {
  EXPECT_EQ(Merged(SmallMicrobatches(1, 512, 8)), 8);
  EXPECT_EQ(Merged(SmallMicrobatches(1, 512, 3)), 3);
  EXPECT_EQ(Merged(SmallMicrobatches(1, 512, 20)), 8);
  EXPECT_EQ(Merged(SmallMicrobatches(2, 1024, 8)), 2);
  EXPECT_EQ(Merged(SmallMicrobatches(1, 1366, 8)), 2);
  EXPECT_EQ(Merged(SmallMicrobatches(1, 2049, 8)), 1);
  EXPECT_EQ(Merged(SmallMicrobatches(1, 4096, 8)), 1);
  EXPECT_EQ(Merged(SmallMicrobatches(8, 2048, 8)), 1);
  EXPECT_EQ(Merged(SmallMicrobatches(1, 512, 1)), 1);
}

TEST(Merging, ProgramsAndCostsAreThoseOfThePasses) {
  const v1::Plan ragged = *PlanJob(SmallMicrobatches(1, 512, 20)), whole = *PlanJob(SmallMicrobatches(8, 512, 3));
  EXPECT_EQ(ragged.num_microbatches(), 20);
  EXPECT_EQ(ragged.microbatch_tokens(), 512);
  EXPECT_EQ(ragged.ranks(0).program(), "0F0 0B0 0F1 0B1 0F2 0B2");
  EXPECT_EQ(whole.microbatches_per_pass(), 1);
  EXPECT_EQ(ragged.ranks(0).program(), whole.ranks(0).program());
  EXPECT_EQ(ragged.ranks(0).memory().SerializeAsString(), whole.ranks(0).memory().SerializeAsString());
  EXPECT_EQ(ragged.stages(0).SerializeAsString(), whole.stages(0).SerializeAsString());
  EXPECT_THAT(ragged.explanation(), HasSubstr("20 micro-batches of 512 tokens, 8 in a pass, in bf16"));
  EXPECT_THAT(whole.explanation(), HasSubstr("3 micro-batches of 4096 tokens in bf16"));
}

TEST(Merging, StaysBelowTheMemory) {
  const auto bytes = [](int merged) {
    const absl::StatusOr<v1::Plan> plan = PlanJob(SmallMicrobatches(1, 512, merged));
    EXPECT_EQ(plan->microbatches_per_pass(), merged);
    return plan->ranks(0).peak_bytes();
  };
  PlanRequest request = SmallMicrobatches(1, 512, 8);
  for (int merged = 1; merged <= 8; ++merged) {
    request.devices = Workers({1}, "cuda", bytes(merged));
    EXPECT_EQ(Merged(request), merged);
    request.devices[0].memory_bytes -= 1;
    if (merged > 1) {
      EXPECT_EQ(Merged(request), merged - 1);
    } else {
      EXPECT_EQ(PlanJob(request).status().code(), absl::StatusCode::kResourceExhausted);
      EXPECT_EQ(DraftPlan(request)->plan.microbatches_per_pass(), 1) << "the message counts with what needs least";
    }
  }
  // Nothing is made again only to merge more.
  request.spec.mutable_parallel()->set_activation_checkpointing("auto");
  request.devices = Workers({1}, "cuda", bytes(1));
  EXPECT_EQ(PlanJob(request)->activation_checkpointing(), "none");
  EXPECT_EQ(Merged(request), 1);
}

TEST(Merging, IsForOneStageOnGpusThatMayRound) {
  PlanRequest request = SmallMicrobatches(1, 512, 8);
  request.spec.mutable_parallel()->clear_merge_micro_batches();
  EXPECT_EQ(Merged(request), 8) << "jobs of before it was there are of one kind with auto";
  request.spec.mutable_parallel()->set_merge_micro_batches("off");
  EXPECT_EQ(Merged(request), 1);
  request.spec.mutable_parallel()->set_merge_micro_batches("auto");
  request.devices[1].deterministic = true;
  EXPECT_EQ(Merged(request), 1);
  request = SmallMicrobatches(1, 512, 8);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(2);
  EXPECT_EQ(Merged(request), 1);
  request = SmallMicrobatches(1, 512, 8);
  request.devices = Workers({2}, "cpu", 0);
  EXPECT_EQ(Merged(request), 1);
}

TEST(Merging, AllReplicasDoTheSame) {
  for (int zero = 0; zero <= 3; ++zero) {
    PlanRequest request = SmallMicrobatches(1, 512, 8);
    request.spec.mutable_parallel()->set_data_parallel_size(2);
    request.spec.mutable_parallel()->set_zero_stage(zero);
    request.spec.mutable_training()->set_global_batch_size(12);  // 6 of each replica
    const absl::StatusOr<v1::Plan> plan = PlanJob(request);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(plan->num_microbatches(), 6);
    EXPECT_EQ(plan->microbatches_per_pass(), 6);
    for (const v1::RankPlan& rank : plan->ranks()) EXPECT_EQ(rank.program(), "0F0 0B0");
  }
}

// A remedy as a change of the spec.
void Obey(const std::string& remedy, v1::JobSpec& spec) {
  for (std::string_view rest = remedy; !rest.empty();) {
    const std::string_view part = rest.substr(0, rest.find(" with "));
    rest.remove_prefix(std::min(rest.size(), part.size() + 6));
    const std::string key(part.substr(0, part.find(':')));
    const std::string value(part.substr(part.find(": ") + 2, part.find(" (") - part.find(": ") - 2));
    if (key == "parallel.schedule")
      spec.mutable_parallel()->set_schedule(value);
    else if (key == "parallel.activation_checkpointing")
      spec.mutable_parallel()->set_activation_checkpointing(value);
    else if (key == "parallel.zero_stage")
      spec.mutable_parallel()->set_zero_stage(std::stoi(value));
    else if (key == "parallel.pipeline_parallel_size")
      spec.mutable_parallel()->set_pipeline_parallel_size(std::stoi(value));
    else if (key == "training.micro_batch_size")
      spec.mutable_training()->set_micro_batch_size(std::stoi(value));
    else if (key == "data.sequence_len")
      spec.mutable_data()->set_sequence_len(std::stoi(value));
    else
      FAIL() << remedy;
  }
}

// Every setting that a refusal names is true, and for micro-batches also the nearest: one more does not fit.
TEST(Remedies, WhatARefusalNamesFits) {
  int refusals = 0, combinations = 0;
  for (const int gib : {2, 3, 4, 6, 9, 16, 30}) {
    for (const char* schedule : {"gpipe", "1f1b"}) {
      for (const int replicas : {1, 2}) {
        PlanRequest request{Spec(), Llama1B(), 10, Workers({32}, "cuda", gib * kGiB)};
        request.spec.mutable_data()->set_sequence_len(2048);
        request.spec.mutable_training()->set_micro_batch_size(13);
        request.spec.mutable_parallel()->set_pipeline_parallel_size(2);
        request.spec.mutable_parallel()->set_data_parallel_size(replicas);
        request.spec.mutable_parallel()->set_schedule(schedule);
        const absl::Status status = PlanJob(request).status();
        if (status.ok()) continue;
        ++refusals;
        const std::string message(status.message());
        const size_t at = message.find("it would fit with ");
        if (at == std::string::npos) {
          EXPECT_THAT(message, HasSubstr("devices with more memory")) << gib;
          continue;
        }
        std::string rest = message.substr(at + 18);
        while (!rest.empty()) {
          const std::string remedy = rest.substr(0, rest.find(", or "));
          rest.erase(0, remedy.size() + 5);
          PlanRequest changed = request;
          Obey(remedy, changed.spec);
          EXPECT_TRUE(PlanJob(changed).ok()) << gib << " GiB, " << schedule << ": " << remedy << ": " << PlanJob(changed).status();
          combinations += remedy.find(" with ") != std::string::npos ? 1 : 0;
          if (remedy.find("micro_batch_size") == std::string::npos) continue;
          changed.spec.mutable_training()->set_micro_batch_size(changed.spec.training().micro_batch_size() + 1);
          EXPECT_FALSE(PlanJob(changed).ok()) << gib << " GiB, " << schedule << ": " << remedy;
        }
      }
    }
  }
  EXPECT_GT(refusals, 8);
  EXPECT_GT(combinations, 4);
}

TEST(Remedies, AGlobalBatchStaysWhole) {
  PlanRequest request{Spec(), Llama1B(), 10, Workers({1}, "cuda", 12 * kGiB)};
  request.spec.mutable_data()->set_sequence_len(2048);
  request.spec.mutable_training()->set_micro_batch_size(12);
  request.spec.mutable_training()->set_global_batch_size(24);
  request.spec.mutable_parallel()->set_pipeline_parallel_size(1);
  const std::string message = ErrorOf(request);
  const int size = SettingIn(PlanJob(request).status(), "training.micro_batch_size");
  ASSERT_GT(size, 0) << message;
  EXPECT_EQ(24 % size, 0) << message;
  EXPECT_THAT(message, HasSubstr(" devices; 1 there)")) << message;
}

TEST(Memory, ARemedyMayBeRecomputation) {
  v1::JobSpec spec = Spec();
  spec.mutable_training()->set_micro_batch_size(1);
  spec.mutable_data()->set_sequence_len(2048);
  spec.mutable_parallel()->set_pipeline_parallel_size(1);
  spec.mutable_parallel()->set_data_parallel_size(2);
  spec.mutable_parallel()->set_activation_checkpointing("none");
  PlanRequest request{spec, Llama1B(), 10, Workers({2}, "cpu", 0)};
  const int64_t needed = DraftPlan(request)->plan.ranks(0).peak_bytes();
  request.devices = Workers({2}, "cpu", needed - needed / 10);
  EXPECT_THAT(std::string(DraftPlan(request)->fit.message()),
              AllOf(HasSubstr("parallel.activation_checkpointing: selective"), HasSubstr("parallel.zero_stage: 3")));
}

}  // namespace
}  // namespace ppft::coordinator
