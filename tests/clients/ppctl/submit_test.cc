#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/sha256.h"
#include "tests/clients/ppctl/fake_coordinator.h"

namespace ppft::ctl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kRows[] = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";

class SubmitTest : public ::testing::Test {
 protected:
  std::string JobYaml(const std::string& more = "") {
    folder_.Write("train.jsonl", kRows);
    return folder_.Write("job.yaml", absl::StrCat("model: {base_model: tiny}\ndata:\n  datasets:\n    - {path: train.jsonl, type: prompt_completion}\n", more));
  }

  FakeCoordinator coordinator_;
  TempFolder folder_;
};

TEST_F(SubmitTest, UploadsReplacesPathsAndPrintsTheId) {
  const Outcome run = Ppctl(coordinator_, {"submit", JobYaml(), "-o", "name", "--set", "training.max_steps=5"});
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.out, "job-00000001\n");
  ASSERT_EQ(coordinator_.submitted.size(), 1u);
  const v1::SubmitJobRequest& request = coordinator_.submitted[0];
  EXPECT_EQ(request.request_id().size(), 32u);
  EXPECT_EQ(request.spec().data().datasets(0).path(), "ds-" + Sha256Hex(kRows).substr(0, 16));
  EXPECT_EQ(request.spec().data().datasets(0).source(), "train.jsonl");
  EXPECT_EQ(request.spec().training().max_steps(), 5);
  EXPECT_EQ(request.spec().data().sequence_len(), 512) << "the model's maximum is below the default";
  EXPECT_EQ(coordinator_.blobs.at(Sha256Hex(kRows)), kRows);
}

TEST_F(SubmitTest, AGivenSequenceLengthIsKept) {
  ASSERT_EQ(Ppctl(coordinator_, {"submit", JobYaml("  sequence_len: 600\n")}).code, 0);
  EXPECT_EQ(coordinator_.submitted[0].spec().data().sequence_len(), 600);
}

TEST_F(SubmitTest, ABaseModelMayBeAPathUnderTheModelRoots) {
  const std::string job = JobYaml();
  for (const char* known : {"/models/llama/tiny-folder", "/models/llama/../llama/tiny-folder/", "llama/tiny-folder"}) {
    const Outcome run = Ppctl(coordinator_, {"submit", job, "--set", absl::StrCat("model.base_model=", known)});
    if (std::string(known).find("..") != std::string::npos) {
      EXPECT_EQ(run.code, 2);
      continue;
    }
    ASSERT_EQ(run.code, 0) << run.err;
    EXPECT_EQ(coordinator_.submitted.back().spec().model().base_model(), "tiny");
    EXPECT_EQ(coordinator_.calls("RegisterModel"), 0);
  }
  ASSERT_EQ(Ppctl(coordinator_, {"submit", job, "--set", "model.base_model=/models/new one/"}).code, 0);
  EXPECT_EQ(coordinator_.registered.path(), "/models/new one");
  EXPECT_EQ(coordinator_.submitted.back().spec().model().base_model(), "new-one");
  coordinator_.Fail("RegisterModel", grpc::StatusCode::INVALID_ARGUMENT, "no such folder");
  const Outcome refused = Ppctl(coordinator_, {"submit", job, "--set", "model.base_model=/etc"});
  EXPECT_EQ(refused.code, 2);
  EXPECT_THAT(refused.err, HasSubstr("model.base_model: no such folder"));
}

TEST_F(SubmitTest, WhatTheCoordinatorHasIsNotSentAgain) {
  coordinator_.blobs[Sha256Hex(kRows)] = kRows;
  ASSERT_EQ(Ppctl(coordinator_, {"submit", JobYaml()}).code, 0);
  EXPECT_EQ(coordinator_.calls("UploadBlob"), 0);
}

TEST_F(SubmitTest, ACutUploadGoesOnWhereItWasCut) {
  std::string rows;
  while (rows.size() < 5u << 20) rows += "{\"prompt\": \"" + std::to_string(rows.size()) + "\", \"completion\": \"b\"}\n";
  const std::string job = JobYaml();
  folder_.Write("train.jsonl", rows);
  coordinator_.cut_upload_after = 2 << 20;
  const Outcome run = Ppctl(coordinator_, {"submit", job});
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(coordinator_.calls("UploadBlob"), 2);
  EXPECT_TRUE(coordinator_.blobs.at(Sha256Hex(rows)) == rows);
}

TEST_F(SubmitTest, ALostAnswerIsAskedForAgainWithTheSameId) {
  coordinator_.Fail("SubmitJob", grpc::StatusCode::UNAVAILABLE);
  coordinator_.Fail("SubmitJob", grpc::StatusCode::UNAVAILABLE);
  const Outcome run = Ppctl(coordinator_, {"submit", JobYaml()});
  ASSERT_EQ(run.code, 0) << run.err;
  ASSERT_EQ(coordinator_.submitted.size(), 3u);
  EXPECT_EQ(coordinator_.submitted[0].request_id(), coordinator_.submitted[2].request_id());
}

TEST_F(SubmitTest, TheUsersRequestIdIsSent) {
  ASSERT_EQ(Ppctl(coordinator_, {"submit", JobYaml(), "--request-id", "once-only"}).code, 0);
  EXPECT_EQ(coordinator_.submitted[0].request_id(), "once-only");
}

TEST_F(SubmitTest, AFullDiskIsAFailureThatSaysSo) {
  coordinator_.Fail("UploadBlob", grpc::StatusCode::RESOURCE_EXHAUSTED, "the disk is full");
  const Outcome run = Ppctl(coordinator_, {"submit", JobYaml()});
  EXPECT_EQ(run.code, 1);
  EXPECT_THAT(run.err, HasSubstr("the disk is full"));
  EXPECT_TRUE(coordinator_.submitted.empty());
}

TEST_F(SubmitTest, ViolationsComeAtTheirPlaces) {
  v1::Violation violation;
  violation.set_field("model.base_model");
  violation.set_message("is not registered");
  coordinator_.violations = {violation};
  for (const char* verb : {"validate", "submit", "plan"}) {
    const Outcome run = Ppctl(coordinator_, {verb, JobYaml()});
    EXPECT_EQ(run.code, 2);
    EXPECT_THAT(run.err, HasSubstr("job.yaml:1:9: model.base_model: is not registered")) << verb;
  }
  EXPECT_EQ(coordinator_.calls("UploadBlob"), 0);
  EXPECT_TRUE(coordinator_.submitted.empty());
}

TEST_F(SubmitTest, AllLocalErrorsAtOnce) {
  folder_.Write("bad.jsonl", absl::StrCat(kRows, kRows, "{\"prompt\": \n"));
  folder_.Write("empty.jsonl", "");
  const std::string job = folder_.Write(
      "job.yaml",
      "model: {base_model: tiny, init_adapter: nowhere}\nadapter: {r: 0}\ndata:\n  datasets:\n    - {path: bad.jsonl, type: prompt_completion}\n"
      "    - {path: gone.jsonl, type: prompt_completion}\n    - {path: empty.jsonl, type: prompt_completion}\n    - {path: ., type: prompt_completion}\n");
  const Outcome run = Ppctl(coordinator_, {"submit", job});
  EXPECT_EQ(run.code, 2);
  EXPECT_THAT(run.err, HasSubstr("job.yaml:2:11: adapter.r: 0"));
  EXPECT_THAT(run.err, HasSubstr("bad.jsonl: row 3"));
  EXPECT_THAT(run.err, HasSubstr("job.yaml:6:8: data.datasets[1].path: there is no file"));
  EXPECT_THAT(run.err, HasSubstr("empty.jsonl: the dataset is empty"));
  EXPECT_THAT(run.err, HasSubstr("is not a file"));
  EXPECT_THAT(run.err, HasSubstr("job.yaml:1:27: model.init_adapter: there is no folder"));
  EXPECT_THAT(run.err, HasSubstr("6 errors"));
}

TEST_F(SubmitTest, AFileThatIsNotThereIsAnsweredWithTheOneThatWasMeant) {
  const std::string rows = folder_.Write("articles.jsonl", kRows);
  const std::string job = folder_.Write("summaries.yaml", "model: {base_model: tiny}\ndata: {datasets: [{path: artikles.jsonl, type: prompt_completion}]}\n");
  EXPECT_THAT(Ppctl(coordinator_, {"submit", job}).err, HasSubstr(absl::StrCat("artikles.jsonl; did you mean ", rows, "? Correct the path")));
  EXPECT_THAT(Ppctl(coordinator_, {"submit", folder_ / "sumaries.yaml"}).err, HasSubstr(absl::StrCat("there is no such file; did you mean ", job, "?")));
  EXPECT_THAT(Ppctl(coordinator_, {"data", "upload", folder_ / "article.jsonl"}).err, HasSubstr(absl::StrCat("did you mean ", rows, "?")));
  const Outcome far = Ppctl(coordinator_, {"submit", folder_ / "other"});
  EXPECT_EQ(far.code, 2);
  EXPECT_THAT(far.err, HasSubstr("other: there is no such file\n"));
}

TEST_F(SubmitTest, AWordThatIsNotKnownIsAnsweredWithTheOneThatWasMeant) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{"list", "-o", "jsn"}, "--output jsn is not known; did you mean json? Use table, json, yaml or name\n"},
      {{"list", "-o", "xml"}, "--output xml is not known: use table, json, yaml or name\n"},
      {{"fetch", "job-1", "--type", "merge"}, "--type merge is not known; did you mean merged?"},
      {{"fetch", "job-1", "--checkpoint", "lates"}, "--checkpoint lates is not known; did you mean latest?"},
      {{"completion", "bahs"}, "\"bahs\" is not known; did you mean bash? Use bash, zsh or fish\n"},
      {{"list", "--staet=RUNNING"}, "--staet is not an option here; did you mean --state?"},
      {{"data", "list", "--sever", "x"}, "--sever is not an option here; did you mean --server?"},
      {{"list", "--nonsense"}, "--nonsense"}};
  for (const auto& [arguments, says] : cases) {
    const Outcome run = Ppctl(coordinator_, arguments);
    EXPECT_EQ(run.code, 2) << arguments[1];
    EXPECT_THAT(run.err, HasSubstr(says));
  }
}

TEST_F(SubmitTest, WhatOnlyTheCoordinatorSeesIsToldWithTheRest) {
  const auto add = [this](const char* field, const char* message) {
    coordinator_.violations.emplace_back().set_field(field);
    coordinator_.violations.back().set_message(message);
  };
  add("adapter.r", "0 is out of range, says the coordinator too");
  add("parallel.pipeline_parallel_size", "9 stages are more than the model's 5 layers");
  add("model.base_model", "no model \"nope\" is registered");
  const std::string job = folder_.Write("job.yaml",
                                        "model: {base_model: nope}\nadapter: {r: 0}\nfoo: 1\nparallel: {pipeline_parallel_size: 9}\n"
                                        "data: {datasets: [{path: gone.jsonl, type: completion}]}\n");
  for (const char* verb : {"validate", "submit", "plan"}) {
    const Outcome run = Ppctl(coordinator_, {verb, job});
    EXPECT_EQ(run.code, 2);
    std::vector<size_t> places;
    for (const char* line : {"job.yaml:1:9: model.base_model: no model", "job.yaml:2:11: adapter.r: 0 is", "job.yaml:3:1: foo: is not a known key",
                             "job.yaml:4:12: parallel.pipeline_parallel_size: 9 stages", "job.yaml:5:20: data.datasets[0].path: there is no file"}) {
      places.push_back(run.err.find(line));
      EXPECT_NE(places.back(), std::string::npos) << line << " is not in: " << run.err;
    }
    EXPECT_TRUE(std::is_sorted(places.begin(), places.end())) << run.err;
    EXPECT_THAT(run.err, HasSubstr("5 errors"));
    EXPECT_THAT(run.err, Not(HasSubstr("says the coordinator too")));
  }
  EXPECT_EQ(coordinator_.validated.spec().adapter().r(), 0) << "not the default: nothing may be judged by it";
  EXPECT_EQ(coordinator_.validated.spec().parallel().pipeline_parallel_size(), 9);
  EXPECT_TRUE(coordinator_.submitted.empty());
  const Outcome run = Ppctl(coordinator_, {"validate", job, "--set", "model.base_model=some/folder"});
  EXPECT_EQ(run.code, 2);
  EXPECT_EQ(coordinator_.calls("RegisterModel"), 0) << "a wrong file changes nothing";
}

TEST_F(SubmitTest, AWrongFileIsWrongWithoutACoordinatorToo) {
  const std::string job = JobYaml("foo: 1\n");
  coordinator_.Stop();
  const Outcome run = Ppctl(coordinator_, {"validate", job});
  EXPECT_EQ(run.code, 2);
  EXPECT_THAT(run.err, HasSubstr("foo: is not a known key"));
  EXPECT_THAT(run.err, HasSubstr(coordinator_.address()));
  EXPECT_EQ(Ppctl(coordinator_, {"validate", JobYaml()}).code, 5);
}

TEST_F(SubmitTest, SettingsWithoutEffectAreAWarning) {
  const Outcome run = Ppctl(coordinator_, {"validate", JobYaml("evaluation: {eval_steps: 5}\n")});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.err, HasSubstr("warning: "));
  EXPECT_THAT(run.err, HasSubstr("job.yaml:5:14: evaluation.eval_steps: has no effect without evaluation rows"));
}

TEST_F(SubmitTest, AFieldMapThatNamesAKeyTwiceIsToldAtItsPlace) {
  const std::string job = JobYaml();
  const Outcome run = Ppctl(coordinator_, {"validate", job, "--set", "data.datasets[0].field_map={prompt: input, completion: input}"});
  EXPECT_EQ(run.code, 2);
  EXPECT_THAT(run.err, HasSubstr("data.datasets[0].field_map: gives the key \"input\" to two parts"));
  EXPECT_THAT(run.err, HasSubstr("1 error"));
}

TEST_F(SubmitTest, ALocalAdapterIsUploaded) {
  folder_.Write("start/adapter_config.json", "{}");
  const std::string job = folder_.Write("job.yaml", absl::StrCat("model: {base_model: tiny, init_adapter: ", folder_ / "start",
                                                                 "}\ndata: {datasets: [{path: ds-0123456789abcdef, type: completion}]}\n"));
  Outcome run = Ppctl(coordinator_, {"submit", job});
  EXPECT_EQ(run.code, 2);
  EXPECT_THAT(run.err, HasSubstr("has no file adapter_model.safetensors"));
  folder_.Write("start/adapter_model.safetensors", "bytes");
  run = Ppctl(coordinator_, {"submit", job});
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(coordinator_.submitted[0].spec().model().init_adapter(), "adapter-0123456789abcdef");
  EXPECT_EQ(coordinator_.blobs.count(Sha256Hex("bytes")), 1u);
}

TEST_F(SubmitTest, ValidateAndDryRunStoreNothing) {
  Outcome run = Ppctl(coordinator_, {"validate", JobYaml()});
  EXPECT_EQ(run.code, 0);
  EXPECT_THAT(run.out, HasSubstr("valid"));
  run = Ppctl(coordinator_, {"submit", JobYaml(), "--dry-run"});
  EXPECT_EQ(run.code, 0);
  EXPECT_THAT(run.out, HasSubstr("  learning_rate: "));
  EXPECT_THAT(run.out, HasSubstr("  sequence_len: 512"));
  const std::string resolved = run.out;
  EXPECT_EQ(Ppctl(coordinator_, {"submit", JobYaml(), "--dry-run", "-o", "yaml"}).out, resolved);
  run = Ppctl(coordinator_, {"validate", folder_.Write("resolved.yaml", resolved)});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_TRUE(coordinator_.blobs.empty());
  EXPECT_TRUE(coordinator_.submitted.empty());
}

TEST_F(SubmitTest, PlanPrintsStages) {
  const Outcome run = Ppctl(coordinator_, {"plan", JobYaml()});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("embedding + layers 0-2"));
  EXPECT_THAT(run.out, HasSubstr("layers 3-4 + head"));
  EXPECT_THAT(run.out, HasSubstr("1 replica, 8 micro-batches of 512 tokens in 3 passes of up to 3, 0 % bubble predicted"));
  EXPECT_THAT(run.out, HasSubstr("activation checkpointing selective"));
  EXPECT_THAT(run.out, HasSubstr("RANK  STAGES  IN FLIGHT  WEIGHTS"));
  EXPECT_THAT(run.out, HasSubstr("0     0       2          1.5 GiB  0 B      320 MiB"));
  EXPECT_THAT(run.out, HasSubstr("does not fit: needs 2 devices, 1 is there"));
}

TEST_F(SubmitTest, FollowEndsWithTheJob) {
  coordinator_.watches = {{MakeJob("job-00000001", v1::JOB_STATE_RUNNING, 2, 7), MakeJob("job-00000001", v1::JOB_STATE_SUCCEEDED, 3, 100)}};
  Outcome run = Ppctl(coordinator_, {"submit", JobYaml(), "--follow"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.out, "job-00000001\n");
  EXPECT_THAT(run.err, HasSubstr("RUNNING  step 7/100"));
  coordinator_.watches = {{MakeJob("job-00000001", v1::JOB_STATE_FAILED, 2)}};
  run = Ppctl(coordinator_, {"submit", JobYaml(), "--follow", "-o", "json"});
  EXPECT_EQ(run.code, 8);
  EXPECT_EQ(nlohmann::json::parse(run.out)["status"]["state"], "JOB_STATE_FAILED");
}

TEST_F(SubmitTest, JobFilesThatCannotBeRead) {
  EXPECT_EQ(Ppctl(coordinator_, {"submit", folder_ / "none.yaml"}).code, 2);
  EXPECT_EQ(Ppctl(coordinator_, {"validate", folder_ / "."}).code, 2);
  const Outcome run = Ppctl(coordinator_, {"validate", folder_.Write("job.yaml", std::string("\0\xff", 2))});
  EXPECT_EQ(run.code, 2);
  EXPECT_THAT(run.err, HasSubstr("job.yaml:1:1: byte 0x00 is not text"));
  EXPECT_THAT(run.err, Not(HasSubstr("is missing"))) << "what could not be read is not missing";
}

TEST_F(SubmitTest, ShowUploadsAndMarksTokens) {
  auto* token = coordinator_.preview.add_rows()->add_tokens();
  token->set_text("hello");
  token->set_supervised(true);
  Outcome run = Ppctl(coordinator_, {"data", "show", JobYaml(), "-n", "2"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("[[hello]]"));
  EXPECT_EQ(coordinator_.previewed.num_rows(), 2);
  EXPECT_EQ(coordinator_.previewed.base_model(), "tiny");
  EXPECT_THAT(coordinator_.previewed.data().datasets(0).path(), HasSubstr("ds-"));
  run = Ppctl(coordinator_, {"data", "show", folder_ / "train.jsonl", "--base-model", "tiny", "--type", "prompt_completion"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(Ppctl(coordinator_, {"data", "show", folder_ / "train.jsonl"}).code, 2);
  EXPECT_EQ(Ppctl(coordinator_, {"data", "show", JobYaml(), "--dataset", "1"}).code, 2);
}

}  // namespace
}  // namespace ppft::ctl
