#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/spec/schema.h"
#include "common/spec/spec.h"
#include "common/spec/suggest.h"

namespace ppft::spec {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kMinimum[] = "model: {base_model: tiny}\ndata:\n  datasets:\n    - {path: train.jsonl, type: prompt_completion}\n";

std::string Errors(const ParseResult& result) {
  std::string text;
  for (const FieldError& error : result.errors) absl::StrAppend(&text, ToString(error), "\n");
  return text;
}

std::string ErrorsOf(absl::string_view text, const std::vector<std::string>& overrides = {}) { return Errors(Parse("job.yaml", text, overrides)); }

TEST(Parse, TheMinimumGetsTheDocumentedDefaults) {
  const ParseResult result = Parse("job.yaml", kMinimum);
  ASSERT_TRUE(result.ok()) << Errors(result);
  const v1::JobSpec& spec = result.spec;
  EXPECT_EQ(spec.name(), "job");
  EXPECT_EQ(spec.seed(), 42);
  EXPECT_EQ(spec.priority(), 50);
  EXPECT_EQ(spec.adapter().r(), 16);
  EXPECT_EQ(spec.adapter().lora_alpha(), 32);
  EXPECT_EQ(spec.adapter().lora_dropout(), 0.05);
  EXPECT_EQ(spec.adapter().target_modules_size(), 7);
  EXPECT_EQ(spec.data().datasets(0).source(), "train.jsonl");
  EXPECT_EQ(spec.data().datasets(0).field_map().at("completion"), "completion");
  EXPECT_EQ(spec.data().instruction_prefix(), "Summarize the following article:\n\n");
  EXPECT_EQ(spec.data().response_prefix(), "\n\nSummary:\n");
  EXPECT_EQ(spec.data().sequence_len(), 1024);
  EXPECT_EQ(spec.training().num_epochs(), 3);
  EXPECT_FALSE(spec.training().has_max_steps());
  EXPECT_FALSE(spec.training().has_warmup_ratio());
  EXPECT_EQ(spec.training().learning_rate(), 2e-4);
  EXPECT_EQ(spec.precision().loss_scale(), 0);
  EXPECT_EQ(spec.parallel().pipeline_parallel_size(), 0);
  EXPECT_EQ(spec.parallel().virtual_stages(), 1);
  EXPECT_THAT(spec.output().formats(), ElementsAre("adapter"));
  EXPECT_EQ(spec.output().merge_dtype(), "");
  EXPECT_EQ(spec.limits().stall_timeout().seconds(), 300);
  EXPECT_FALSE(spec.limits().has_max_duration());
}

TEST(Parse, AWholeJobAsGetPrintsItIsReadByItsSpec) {
  const ParseResult first = Parse("job.yaml", kMinimum, {"adapter.r=4", "labels={team: nlp}"});
  ASSERT_TRUE(first.ok()) << Errors(first);
  std::string job = "id: job-k3x9a2b7\nname: job\nstatus:\n  state: JOB_STATE_SUCCEEDED\n  step: 3\nspec:\n";
  for (const absl::string_view line : absl::StrSplit(ToYaml(first.spec), '\n', absl::SkipEmpty())) absl::StrAppend(&job, "  ", line, "\n");
  const ParseResult again = Parse("again.yaml", job);
  ASSERT_TRUE(again.ok()) << Errors(again);
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(first.spec, again.spec));
  EXPECT_THAT(ErrorsOf(absl::StrCat(job, "  adaptor: {}\n")), HasSubstr("adapter")) << "still checked, at its own line";
  EXPECT_THAT(ErrorsOf(absl::StrCat("spec: {}\n", kMinimum)), HasSubstr("spec: is not a known key")) << "only a whole job has a spec";
}

TEST(Parse, EveryLeafOfTheMessageHasARule) {
  std::vector<std::string> missing;
  std::function<void(const google::protobuf::Descriptor*, const std::string&)> visit = [&](const google::protobuf::Descriptor* descriptor,
                                                                                           const std::string& prefix) {
    for (int i = 0; i < descriptor->field_count(); ++i) {
      const auto* field = descriptor->field(i);
      const std::string path = Join(prefix, field->name());
      if (IsGroup(field)) {
        visit(field->message_type(), field->is_repeated() ? path + "[]" : path);
      } else if (FindRule(path) == nullptr) {
        missing.push_back(path);
      }
    }
  };
  visit(v1::JobSpec::descriptor(), "");
  EXPECT_THAT(missing, ElementsAre());
}

TEST(Parse, WholeFileAsDocumented) {
  const ParseResult result = Parse("job.yaml", R"(
name: xsum-llama32-1b
labels: {team: nlp}
seed: 7
model:
  base_model: llama-3.2-1b-instruct   # registered
  init_adapter: null
adapter: {lora_r: 8, target_modules: [v_proj, q_proj], use_rslora: true}
data:
  datasets:
    - path: train.jsonl
      type: summarization
      field_map: {document: article}
  val_set_size: 0.02
  roles_to_train: [assistant]
  sequence_len: auto
training:
  max_steps: 10
  global_batch_size: 64
  lr_scheduler: cosine_with_min_lr
  warmup_ratio: 0.03
precision: {loss_scale: dynamic}
parallel: {pipeline_parallel_size: auto, layers_per_stage: null}
evaluation: {early_stopping_patience: 2}
limits: {max_duration: 2h, stall_timeout: 1m30s}
)");
  ASSERT_TRUE(result.ok()) << Errors(result);
  EXPECT_EQ(result.spec.adapter().r(), 8);
  EXPECT_THAT(result.spec.adapter().target_modules(), ElementsAre("q_proj", "v_proj"));
  EXPECT_EQ(result.spec.data().datasets(0).field_map().at("document"), "article");
  EXPECT_EQ(result.spec.data().datasets(0).field_map().at("summary"), "summary");
  EXPECT_EQ(result.spec.training().gradient_accumulation_steps(), 16);
  EXPECT_EQ(result.spec.training().min_lr_ratio(), 0.1);
  EXPECT_FALSE(result.spec.training().has_num_epochs());
  EXPECT_EQ(result.spec.limits().max_duration().seconds(), 7200);
  EXPECT_EQ(result.spec.limits().stall_timeout().seconds(), 90);
  EXPECT_EQ(result.given.count("data.sequence_len"), 0u);
  EXPECT_EQ(result.given.count("adapter.r"), 1u);
}

struct Wrong {
  const char* text;                 // appended to the minimum
  std::vector<const char*> expect;  // parts of the errors
};

TEST(Parse, RefusesWithPlaceFieldAndRemedy) {
  const std::vector<Wrong> cases = {
      {"adapter: {r: 0}", {"job.yaml:5:11: adapter.r: 0 is out of range: use a whole number from 1 to 1024"}},
      {"adapter: {rank: 1000000000}", {"job.yaml:5:11: adapter.r: 1000000000 is out of range"}},
      {"adapter: {r: 99999999999999999999999}", {"adapter.r: 99999999999999999999999 is out of range"}},
      {"adapter: {r: 1.5}", {"adapter.r: is \"1.5\", but must be a whole number"}},
      {"adapter: {r: \"8\"}", {"remove the quotes"}},
      {"adapter: {r: 0x10}", {"whole number"}},
      {"adapter: {r: [8]}", {"adapter.r: is a list"}},
      {"adapter:\n  r: 8\n  lora_r: 8", {"job.yaml:7:3: adapter.lora_r: is given twice (first in line 6), there as r"}},
      {"adapter: 8", {"job.yaml:5:1: adapter: is \"8\", but must be a group of keys: r, lora_alpha"}},
      {"adapter: {target_modules: [q_prj]}", {"adapter.target_modules[0]: \"q_prj\" is not known; did you mean q_proj?"}},
      {"adapter: {target_modules: [q_proj, q_proj]}", {"target_modules[1]", "twice"}},
      {"adapter: {target_modules: [all-linear]}", {"stands alone"}},
      {"adapter: {target_modules: []}", {"target_modules: is empty"}},
      {"adapter: {use_rslora: yes}", {"true or false"}},
      {"adapter: {lora_alpha: 16.5}", {"job.yaml:5:11: adapter.lora_alpha: is \"16.5\", but must be a whole number from 1 to 1000000"}},
      {"adapter: {lora_alpha: 0}", {"adapter.lora_alpha: 0 is out of range: use a whole number from 1 to 1000000"}},
      {"training: {max_stepz: 3}", {"job.yaml:5:12: training.max_stepz: is not a known key; did you mean max_steps?"}},
      {"max_steps: 3", {"did you mean training.max_steps?"}},
      {"training: {per_device_train_batch_size: 3}", {"did you mean training.micro_batch_size?"}},
      {"training: {learning_rate: fast}", {"learning_rate: is \"fast\", but must be a number above 0"}},
      {"training: {learning_rate: -1}", {"learning_rate: -1 is out of range: use a number above 0 and at most 1e6"}},
      {"training: {learning_rate: 1e30}", {"learning_rate: 1e+30 is out of range: use a number above 0 and at most 1e6"}},
      {"training: {num_epochs: 1e18}", {"num_epochs: 1e+18 is out of range: use a number above 0 and at most 1e6"}},
      {"training: {max_steps: 9223372036854775807}", {"max_steps: 9223372036854775807 is out of range: use a whole number from 1 to 1000000000000"}},
      {"training: {warmup_ratio: 1}", {"warmup_ratio: 1 is out of range: use a number from 0 to below 1"}},
      {"training: {learning_rate: .inf}", {"learning_rate: .inf is not a finite number"}},
      {"training: {learning_rate: -.NaN}", {"not a finite number"}},
      {"training: {learning_rate: 1e999}", {"learning_rate: infinity is not a finite number"}},
      {"training: {num_epochs: 1, max_steps: 3}", {"job.yaml:5:12: training.num_epochs: num_epochs and max_steps contradict"}},
      {"training: {max_steps: 3, warmup_steps: 4000}", {"warmup_steps (4000) is more than max_steps (3)"}},
      {"training: {warmup_steps: 4, warmup_ratio: 0.1}", {"warmup_ratio and warmup_steps contradict"}},
      {"training: {global_batch_size: 30}", {"global_batch_size (30) is not a multiple of micro_batch_size (4) x data_parallel_size (1): use 28 or 32"}},
      {"training: {global_batch_size: 32, gradient_accumulation_steps: 4}", {"global_batch_size (32) contradicts gradient_accumulation_steps (4)"}},
      {"training: {min_lr_ratio: 0.2}", {"min_lr_ratio has no effect with lr_scheduler: cosine"}},
      {"training: {optimizer: sgd}", {"training.optimizer: \"sgd\" is not supported yet: use adamw"}},
      {"training: {optimizer: adamv}", {"did you mean adamw?"}},
      {"parallel: {schedule: zigzag}", {"parallel.schedule: \"zigzag\" is not known: use one of auto, gpipe, 1f1b, interleaved_1f1b"}},
      {"parallel: {schedule: interleaved_1f1b}", {"job.yaml:5:12: parallel.virtual_stages", "at least 2"}},
      {"parallel: {virtual_stages: 2}", {"virtual_stages (2) needs schedule: interleaved_1f1b"}},
      {"parallel: {schedule: interleaved_1f1b, virtual_stages: 2, pipeline_parallel_size: 3}",
       {"training.gradient_accumulation_steps: gradient_accumulation_steps (8) must be a multiple of pipeline_parallel_size (3)", "use 9"}},
      {"parallel: {pipeline_parallel_size: 3, layers_per_stage: [1, 2]}", {"layers_per_stage has 2 numbers", "asks for 3"}},
      {"parallel: {layers_per_stage: [1, -2]}", {"parallel.layers_per_stage[1]: is \"-2\""}},
      {"parallel: {layers_per_stage: [1, 0]}", {"parallel.layers_per_stage[1]: is \"0\"", "from 1 to 10000"}},
      {"parallel: {pipeline_parallel_size: 0}", {"parallel.pipeline_parallel_size: 0 is out of range: use a whole number from 1 to 1024 or auto"}},
      {"parallel: {data_parallel_size: 0}", {"parallel.data_parallel_size: 0 is out of range: use a whole number from 1 to 1024 or auto"}},
      {"parallel: {zero_stage: 4}", {"parallel.zero_stage: 4 is out of range: use a whole number from 0 to 3"}},
      {"parallel: {activation_checkpointing: some}", {"activation_checkpointing: \"some\" is not known: use one of none, full, selective, auto"}},
      {"parallel: {merge_micro_batches: on}", {"parallel.merge_micro_batches: \"on\" is not known: use one of auto, off"}},
      {"precision: {compute: fp8}", {"precision.compute: \"fp8\" is not known"}},
      {"precision: {compute: fp12}", {"precision.compute: \"fp12\" is not known; did you mean fp32?"}},
      {"precision: {loss_scale: 0}", {"loss_scale: 0 is out of range: use a number above 0 and at most 1e18 or dynamic"}},
      {"precision: {loss_scale: 1024, initial_scale_power: 8}",
       {"precision.initial_scale_power: initial_scale_power steers a dynamic loss scale and contradicts loss_scale: 1024"}},
      {"evaluation: {early_stopping_patience: 1}", {"early_stopping_patience needs evaluation rows"}},
      {"output: {formats: [adapter, gguf]}", {"output.formats[1]: \"gguf\" is not known"}},
      {"limits: {stall_timeout: 300}", {"limits.stall_timeout: is \"300\", but must be a duration with its unit"}},
      {"limits: {stall_timeout: 0s}", {"0s is out of range: use a duration with its unit, such as 300s, 5m or 2h, from 1s to 168h"}},
      {"1: 2", {"job.yaml:5:1: 1: is not a known key; the keys here are name, labels"}},
      {"'': 2", {"job.yaml:5:1: \"\": is not a known key; the keys here are name, labels"}},
      {"limits: {max_duration: inf}", {"duration"}},
      {"name: Has Blanks", {"name: \"Has Blanks\" is not a name"}},
      {"name: a\nname: b", {"job.yaml:6:1: name: is given twice (first in line 5)"}},
      {"labels: [a]", {"labels: is a list"}},
      {"priority: 101", {"priority: 101 is out of range: use a whole number from 0 to 100"}},
  };
  for (const Wrong& wrong : cases) {
    const std::string errors = ErrorsOf(absl::StrCat(kMinimum, wrong.text, "\n"));
    for (const char* part : wrong.expect) EXPECT_THAT(errors, HasSubstr(part)) << wrong.text;
    EXPECT_EQ(std::count(errors.begin(), errors.end(), '\n'), 1) << "one cause, one error: " << wrong.text << "\n" << errors;
  }
}

TEST(Parse, RefusesWrongDatasets) {
  const auto with = [](absl::string_view data) { return ErrorsOf(absl::StrCat("model: {base_model: tiny}\ndata: ", data, "\n")); };
  EXPECT_THAT(with("{datasets: train.jsonl}"), HasSubstr("data.datasets: is \"train.jsonl\", but must be a list"));
  EXPECT_THAT(with("{datasets: [train.jsonl]}"), HasSubstr("data.datasets[0]: is \"train.jsonl\", but must be a group of keys: path"));
  EXPECT_THAT(with("{datasets: []}"), HasSubstr("data.datasets: is missing"));
  EXPECT_THAT(with("{datasets: [{path: a}]}"), HasSubstr("data.datasets[0].type: is missing: say what a row holds"));
  EXPECT_THAT(with("{datasets: [{type: completion}]}"), HasSubstr("data.datasets[0].path: is missing"));
  EXPECT_THAT(with("{datasets: [{path: a, type: alpaca}]}"), HasSubstr("data.datasets[0].type: \"alpaca\" is not supported yet"));
  EXPECT_THAT(with("{datasets: [{path: a, type: complete}]}"), HasSubstr("did you mean completion?"));
  for (const char* word : {"parquet", "alpacca"}) {
    EXPECT_THAT(with(absl::StrCat("{datasets: [{path: a, type: ", word, "}]}")),
                HasSubstr(absl::StrCat("\"", word, "\" is not known: use one of summarization, prompt_completion, completion\n")))
        << "only what is supported";
  }
  EXPECT_THAT(with("{datasets: [{path: a, type: summarization, field_map: {dokument: x}}]}"), HasSubstr("did you mean document?"));
  EXPECT_THAT(with("{datasets: [{path: a, type: prompt_completion, field_map: {prompt: input, completion: input}}]}"),
              HasSubstr("job.yaml:2:54: data.datasets[0].field_map: gives the key \"input\" to two parts of a row, prompt and completion"));
  EXPECT_THAT(with("{datasets: [{path: a, type: completion}], val_set_size: 0.1, test_datasets: [{path: b, type: completion}]}"),
              HasSubstr("val_set_size and test_datasets contradict"));
  EXPECT_THAT(with("{datasets: [{path: a, type: completion}], roles_to_train: [user]}"), HasSubstr("data.roles_to_train: \"user\" is not supported yet"));
  EXPECT_THAT(with("{datasets: [{path: a, type: completion}], chat_template: my.jinja}"), HasSubstr("not supported yet"));
}

TEST(Parse, AllErrorsAtOnceInFileOrder) {
  const ParseResult result = Parse("some/job.yaml", absl::StrCat(kMinimum, "adapter: {r: 0}\ntraining: {max_stepz: 3}\nparallel: {schedule: zigzag}\n"));
  std::vector<int> lines;
  for (const FieldError& error : result.errors) lines.push_back(error.line);
  EXPECT_THAT(lines, ElementsAre(5, 6, 7));
  EXPECT_THAT(Errors(result), HasSubstr("some/job.yaml:7:"));
}

// Of a file with errors the rest is judged by others, and what they say is told once.
TEST(Parse, WhatIsNotWrongIsJudgedOn) {
  const ParseResult result = Parse("job.yaml",
                                   "model: {base_model: nope}\nadaptor: {r: 4}\ndata:\n  sequence_len: many\n  datasets:\n"
                                   "    - {path: a.jsonl, type: complete}\n    - {path: b.jsonl, type: completion}\n"
                                   "training: {max_stepz: 3}\nparallel: {pipeline_parallel_size: 9, layers_per_stage: [1, 0]}\n");
  EXPECT_EQ(result.errors.size(), 5u) << Errors(result);
  const v1::JobSpec judged = result.Judgeable();
  EXPECT_EQ(judged.model().base_model(), "nope");
  EXPECT_EQ(judged.parallel().pipeline_parallel_size(), 9);
  EXPECT_EQ(judged.data().datasets(1).type(), "completion");
  EXPECT_FALSE(judged.has_adapter());
  EXPECT_EQ(judged.data().sequence_len(), 0);
  EXPECT_EQ(judged.data().datasets(0).type(), "");
  EXPECT_EQ(judged.parallel().layers_per_stage_size(), 0);
  google::protobuf::RepeatedPtrField<v1::Violation> violations;
  for (const v1::Violation& own : Check(judged)) *violations.Add() = own;
  EXPECT_GT(violations.size(), 3);
  EXPECT_EQ(result.News(judged, violations).size(), 0u) << "nothing but what the file's errors say";
  const auto add = [&](const char* field, const char* message) {
    v1::Violation& violation = *violations.Add();
    violation.set_field(field);
    violation.set_message(message);
  };
  add("model.base_model", "is not registered");
  add("model.base_model", "is not registered");
  add("parallel.pipeline_parallel_size", "9 stages are more than the model's layers");
  add("data.sequence_len", "is beyond the model");
  add("adapter.r", "hangs on what is wrong");
  std::vector<std::string> news;
  for (const FieldError& error : result.News(judged, violations)) news.push_back(ToString(error));
  EXPECT_THAT(news, ElementsAre("job.yaml:1:9: model.base_model: is not registered",
                                "job.yaml:9:12: parallel.pipeline_parallel_size: 9 stages are more than the model's layers"));
}

TEST(Parse, ATextThatBreaksOffIsJudgedByWhatStandsBefore) {
  const ParseResult result = Parse("job.yaml", "parallel: {pipeline_parallel_size: 9}\nmodel: [ {\n");
  ASSERT_FALSE(result.readable);
  EXPECT_THAT(
      ErrorsOf("adapter: {r: 0}\noutput: {verify: maybe, formats: [\n"),
      AllOf(HasSubstr("not valid YAML"), HasSubstr("adapter.r: 0"), HasSubstr("output.verify"), Not(HasSubstr("formats: is")), Not(HasSubstr("is missing"))));
  google::protobuf::RepeatedPtrField<v1::Violation> violations;
  for (const char* field : {"parallel.pipeline_parallel_size", "data.sequence_len"}) {
    violations.Add()->set_field(field);
  }
  const std::vector<FieldError> news = result.News(result.Judgeable(), violations);
  ASSERT_EQ(news.size(), 1u);
  EXPECT_EQ(news[0].field, "parallel.pipeline_parallel_size");
}

TEST(Parse, SettingsWithoutEffectAreWarnedOf) {
  const auto warnings = [](absl::string_view more) {
    const ParseResult result = Parse("job.yaml", absl::StrCat(kMinimum, more));
    EXPECT_TRUE(result.ok()) << Errors(result);
    std::vector<std::string> fields;
    for (const FieldError& warning : result.warnings) fields.push_back(ToString(warning).substr(0, ToString(warning).find(" without")));
    return fields;
  };
  EXPECT_THAT(warnings("evaluation: {eval_steps: 10, eval_on_start: true}\ncheckpoint: {load_best_model_at_end: true}\n"),
              ElementsAre("job.yaml:5:14: evaluation.eval_steps: has no effect", "job.yaml:5:30: evaluation.eval_on_start: has no effect",
                          "job.yaml:6:14: checkpoint.load_best_model_at_end: has no effect"));
  EXPECT_THAT(warnings("evaluation: {eval_steps: 0, eval_on_start: false}\ncheckpoint: {load_best_model_at_end: false}\n"), ElementsAre());
  EXPECT_THAT(warnings("  val_set_size: 0.5\nevaluation: {eval_steps: 10}\ncheckpoint: {load_best_model_at_end: true}\n"), ElementsAre());
  EXPECT_THAT(warnings(""), ElementsAre());
  EXPECT_THAT(warnings("precision: {compute: bf16, loss_scale: 1024}\n"), ElementsAre("job.yaml:5:28: precision.loss_scale: has no effect"));
  EXPECT_THAT(warnings("precision: {initial_scale_power: 8, consecutive_hysteresis: true}\n"),
              ElementsAre("job.yaml:5:13: precision.initial_scale_power: has no effect", "job.yaml:5:37: precision.consecutive_hysteresis: has no effect"));
  EXPECT_THAT(warnings("precision: {compute: fp16, loss_scale: 1024}\n"), ElementsAre());
  EXPECT_THAT(warnings("precision: {compute: fp32, loss_scale: dynamic, hysteresis: 2}\n"), ElementsAre()) << "what they are anyway";
  EXPECT_THAT(warnings("output: {merge_dtype: float16}\n"), ElementsAre("job.yaml:5:10: output.merge_dtype: has no effect"));
  EXPECT_THAT(warnings("output: {merge_dtype: float16, formats: [merged]}\n"), ElementsAre());
  const auto one_replica = warnings("parallel: {zero_stage: 3}\n");
  ASSERT_EQ(one_replica.size(), 1u);
  EXPECT_THAT(one_replica[0], HasSubstr("parallel.zero_stage: has no effect with one replica"));
  EXPECT_THAT(warnings("parallel: {zero_stage: 3, data_parallel_size: 2}\n"), ElementsAre());
  EXPECT_THAT(warnings("parallel: {zero_stage: 0}\n"), ElementsAre());
}

TEST(Parse, EmptyFilesSayWhatIsNeeded) {
  for (const char* text : {"", "\n# nothing\n", "---\n", "{}\n", "model:\ndata:\n"}) {
    const std::string errors = ErrorsOf(text);
    EXPECT_THAT(errors, HasSubstr("model.base_model: is missing")) << text;
    EXPECT_THAT(errors, HasSubstr("data.datasets: is missing")) << text;
  }
  EXPECT_THAT(ErrorsOf("- a\n"), HasSubstr("holds a list"));
}

TEST(Parse, OverridesReplaceAddAndRemove) {
  ParseResult result =
      Parse("job.yaml", absl::StrCat(kMinimum, "training: {num_epochs: 2}\n"),
            {"training.num_epochs=null", "training.max_steps=5", "data.datasets[0].path=other.jsonl", "adapter.target_modules=[q_proj]", "labels.team=nlp"});
  ASSERT_TRUE(result.ok()) << Errors(result);
  EXPECT_EQ(result.spec.training().max_steps(), 5);
  EXPECT_EQ(result.spec.data().datasets(0).path(), "other.jsonl");
  EXPECT_THAT(result.spec.adapter().target_modules(), ElementsAre("q_proj"));
  EXPECT_EQ(result.spec.labels().at("team"), "nlp");
  EXPECT_THAT(ErrorsOf(kMinimum, {"adapter.r=0"}), HasSubstr("--set adapter.r=0: adapter.r: 0 is out of range"));
  EXPECT_THAT(ErrorsOf(kMinimum, {"adapter.r"}), HasSubstr("KEY=VALUE"));
  EXPECT_THAT(ErrorsOf(kMinimum, {"=3"}), HasSubstr("KEY=VALUE"));
  EXPECT_THAT(ErrorsOf(kMinimum, {"a..b=3"}), HasSubstr("KEY=VALUE"));
  EXPECT_THAT(ErrorsOf(kMinimum, {"data.datasets[7].path=x"}), HasSubstr("has entries 0 to 0"));
  EXPECT_THAT(ErrorsOf(kMinimum, {"model.base_model.x=1"}), HasSubstr("is a value"));
  EXPECT_THAT(ErrorsOf(kMinimum, {"name=[ {"}), HasSubstr("--set name=[ {: not valid YAML"));
  EXPECT_THAT(ErrorsOf(absl::StrCat(kMinimum, "adapter: {rank: 4}\n"), {"adapter.r=2000"}), Not(HasSubstr("twice")));
}

TEST(Parse, LocateFindsTheNearestWrittenKey) {
  const ParseResult result = Parse("job.yaml", kMinimum);
  v1::Violation violation;
  violation.set_message("x");
  violation.set_field("model.base_model");
  EXPECT_EQ(ToString(result.Locate(violation)), "job.yaml:1:9: model.base_model: x");
  violation.set_field("data.datasets[0].type");
  EXPECT_EQ(result.Locate(violation).line, 4);
  violation.set_field("data.sequence_len");
  EXPECT_EQ(result.Locate(violation).line, 2);
  violation.set_field("parallel.pipeline_parallel_size");
  EXPECT_EQ(result.Locate(violation).line, 1);
}

TEST(ToYaml, ParsesBackToTheSameMessage) {
  const std::vector<std::string> texts = {
      kMinimum,
      absl::StrCat(kMinimum, "adapter: {lora_alpha: 1000000}\n"),
      absl::StrCat(
          kMinimum, "name: n0\nlabels: {a: 'x: \"y\" \\ #', 'true': 'null', '1': ''}\nseed: 9007199254740991\n",
          "training: {max_steps: 3, warmup_steps: 2, learning_rate: 0.1234567890123456789, lr_scheduler: wsd, decay_ratio: 0.3, min_lr_ratio: 1e-300, "
          "global_batch_size: 64}\n",
          "limits: {max_duration: 1.5s, stall_timeout: 2h}\nprecision: {loss_scale: 1024}\nparallel: {pipeline_parallel_size: 2, layers_per_stage: [3, 2]}\n",
          "output: {formats: [merged, adapter], merge_dtype: float16}\nmodel2: null\n"),
      "model: {base_model: tiny, init_adapter: some/folder}\ndata:\n  instruction_prefix: \"\"\n  response_prefix: \"tab\\t line\\n \\u00e9 \\x01 \\\"q\\\" "
      "\\\\ end \"\n  test_datasets:\n"
      "    - {path: ds-0123456789abcdef, source: \"my file.jsonl\", type: summarization, field_map: {summary: \"a b\"}}\n  datasets:\n    - {path: a.jsonl, "
      "type: completion}\n"
      "    - {path: \"123\", type: prompt_completion}\n",
  };
  for (const std::string& text : texts) {
    ParseResult first = Parse("job.yaml", text);
    if (text.find("model2") != std::string::npos) {
      ASSERT_EQ(first.errors.size(), 1u) << Errors(first);
    } else {
      ASSERT_TRUE(first.ok()) << Errors(first);
    }
    const std::string yaml = ToYaml(first.spec);
    const ParseResult second = Parse("resolved.yaml", yaml);
    ASSERT_TRUE(second.ok()) << Errors(second) << yaml;
    std::string difference;
    google::protobuf::util::MessageDifferencer differencer;
    differencer.ReportDifferencesToString(&difference);
    EXPECT_TRUE(differencer.Compare(first.spec, second.spec)) << difference << yaml;
    EXPECT_TRUE(Check(first.spec).empty());
  }
}

TEST(ToYaml, CommentsStandBesideTheirFieldAndAreNotRead) {
  const ParseResult first = Parse("job.yaml", absl::StrCat(kMinimum, "adapter: {lora_alpha: 16.0}\n"));
  ASSERT_TRUE(first.ok()) << Errors(first);
  const std::string yaml = ToYaml(first.spec, {{"parallel.schedule", "planned: 1f1b"}, {"parallel.pipeline_parallel_size", "planned: 2"}});
  EXPECT_THAT(yaml, HasSubstr("\n  pipeline_parallel_size: auto  # planned: 2\n"));
  EXPECT_THAT(yaml, HasSubstr("\n  schedule: auto  # planned: 1f1b\n"));
  EXPECT_THAT(yaml, HasSubstr("\n  lora_alpha: 16\n"));
  const ParseResult second = Parse("again.yaml", yaml);
  ASSERT_TRUE(second.ok()) << Errors(second);
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(first.spec, second.spec));
}

// Damaged files: an error or a valid job, never anything else. The generator's seed is fixed.
TEST(Parse, DamagedFilesAreRefusedOrValid) {
  const std::string whole = absl::StrCat(
      kMinimum, "name: n0\nlabels: {a: 'x'}\ntraining:\n  max_steps: 3\n  learning_rate: 1e-3\nadapter: {r: 4, target_modules: [q_proj, \"v_proj\"]}\n",
      "limits: {max_duration: 1h}\noutput:\n  formats:\n  - adapter\n  - merged\nparallel: {layers_per_stage: [3, 2], pipeline_parallel_size: 2}\n");
  ASSERT_TRUE(Parse("job.yaml", whole).ok()) << ErrorsOf(whole);
  std::minstd_rand random(1);
  constexpr char kBytes[] = "[]{}:,-\"'&*!|>#%@`\n\t 019.eInf~\\x\xc3\xa9";
  int valid = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text = whole;
    for (int edits = 1 + static_cast<int>(random() % 3); edits > 0; --edits) {
      const size_t at = random() % text.size();
      const char byte = kBytes[random() % (sizeof(kBytes) - 1)];
      if (random() % 3 == 0) {
        text.erase(at, 1 + random() % 8);
      } else if (random() % 2 == 0) {
        text.insert(at, 1, byte);
      } else {
        text[at] = byte;
      }
    }
    const ParseResult result = Parse("job.yaml", text);
    if (!result.ok()) continue;
    ++valid;
    EXPECT_TRUE(Check(result.spec).empty()) << text;
    const ParseResult again = Parse("job.yaml", ToYaml(result.spec));
    EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(result.spec, again.spec)) << text << Errors(again);
  }
  EXPECT_GT(valid, 10);
}

TEST(NearestName, FindsSlipsAndBeginningsButNothingFarFetched) {
  const std::vector<std::string> models = {"llama-3.2-1b-instruct", "stories15M", "tiny"};
  EXPECT_EQ(NearestName("lama-3.2-1b-instrct", models), "llama-3.2-1b-instruct");
  EXPECT_EQ(NearestName("Stories-15m", models), "stories15M");
  EXPECT_EQ(NearestName("llama-3.2-1b", models), "llama-3.2-1b-instruct") << "the only one that begins so";
  EXPECT_EQ(NearestName("sto", models), "stories15M");
  EXPECT_EQ(NearestName("qwen-2.5-1b-instruct", models), "") << "alike in its end alone";
  EXPECT_EQ(NearestName("s", models), "");
  EXPECT_EQ(NearestName("", models), "");
  EXPECT_EQ(NearestName("toy", {"tin"}), "");
  EXPECT_EQ(NearestName("train", {"train-a.jsonl", "train-b.jsonl"}), "") << "two begin so";
  EXPECT_EQ(NearestName("train-", {"train-a.jsonl", "train-a.jsonl"}), "train-a.jsonl") << "one name of two contents";
  EXPECT_EQ(NearestName("job-k3x9a2b8", {"job-qqqqqqqq", "job-k3x9a2b7"}), "job-k3x9a2b7");
  EXPECT_EQ(NearestName("job-aaaaaaaa", {"job-k3x9a2b7"}), "");
  EXPECT_EQ(NearestName(std::string(100000, 'a'), {std::string(100000, 'b')}), "");
  EXPECT_EQ(NotThere("job", "demmo", {"demo"}, "ppctl list"), "no job \"demmo\"; did you mean \"demo\"? See `ppctl list`");
  EXPECT_EQ(UseOneOf("jsn", {"table", "json", "name"}), "; did you mean json? Use table, json or name");
  EXPECT_EQ(UseOneOf("xml", {"json"}), ": use json");
  EXPECT_EQ(NotThere("job", "other", {"demo"}, "ppctl list"), "no job \"other\": see `ppctl list`");
}

TEST(Nearest, FindsSlipsAndNothingElse) {
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3);
  EXPECT_EQ(EditDistance("ab", "ba"), 1);
  EXPECT_EQ(EditDistance("", "abc"), 3);
  EXPECT_EQ(Nearest("max_stepz", {"min_steps", "max_steps"}), "max_steps");
  EXPECT_EQ(Nearest("unrelated", {"r", "lora_alpha"}), "");
  EXPECT_EQ(Nearest("1", {"r"}), "") << "nothing of it stands there";
  EXPECT_EQ(Nearest("", {"r"}), "");
  EXPECT_EQ(Nearest("R", {"r"}), "r");
}

}  // namespace
}  // namespace ppft::spec
