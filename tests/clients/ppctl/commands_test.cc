// Exit codes, output formats and the smaller commands.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "tests/clients/ppctl/fake_coordinator.h"

namespace ppft::ctl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::json;

class CommandsTest : public ::testing::Test {
 protected:
  FakeCoordinator coordinator_;
  TempFolder folder_;
};

TEST_F(CommandsTest, ExitCodesFollowTheAnswer) {
  const std::pair<grpc::StatusCode, int> codes[] = {
      {grpc::StatusCode::INVALID_ARGUMENT, 2},    {grpc::StatusCode::NOT_FOUND, 3},        {grpc::StatusCode::PERMISSION_DENIED, 4},
      {grpc::StatusCode::UNAUTHENTICATED, 4},     {grpc::StatusCode::UNAVAILABLE, 5},      {grpc::StatusCode::ALREADY_EXISTS, 7},
      {grpc::StatusCode::FAILED_PRECONDITION, 7}, {grpc::StatusCode::ABORTED, 7},          {grpc::StatusCode::INTERNAL, 1},
      {grpc::StatusCode::DATA_LOSS, 1},           {grpc::StatusCode::DEADLINE_EXCEEDED, 6}};
  // The connection has to be there for a deadline to be the coordinator's.
  for (const auto& [status, code] : codes) {
    coordinator_.Fail("GetStatus", status, "as the test wants it");
    const Outcome run = Ppctl(coordinator_, {"status"});
    EXPECT_EQ(run.code, code) << run.err;
    EXPECT_EQ(run.out, "");
  }
}

TEST_F(CommandsTest, AnUnreachableCoordinatorIsNamed) {
  coordinator_.Stop();
  const Outcome run = Ppctl(coordinator_, {"list", "--timeout", "5m"});
  EXPECT_EQ(run.code, 5);
  EXPECT_THAT(run.err, HasSubstr(coordinator_.address()));
  EXPECT_THAT(run.err, HasSubstr("deploy/local up"));
}

TEST_F(CommandsTest, UsageErrors) {
  EXPECT_EQ(Ppctl(coordinator_, {}).code, 2);
  EXPECT_THAT(Ppctl(coordinator_, {"lst"}).err, HasSubstr("\"lst\" is not a command; did you mean list?"));
  EXPECT_THAT(Ppctl(coordinator_, {"data", "shw"}).err, HasSubstr("did you mean show?"));
  EXPECT_EQ(Ppctl(coordinator_, {"list", "--nonsense"}).code, 2);
  EXPECT_EQ(Ppctl(coordinator_, {"list", "-o", "xml"}).code, 2);
  EXPECT_EQ(Ppctl(coordinator_, {"list", "--timeout", "soon"}).code, 2);
  EXPECT_EQ(Ppctl(coordinator_, {"list", "--state", "sleeping"}).code, 2);
  EXPECT_EQ(Ppctl(coordinator_, {"list", "--label", "x"}).code, 2);
  std::ostringstream out, err;
  Terminal terminal{&out, &err};
  EXPECT_EQ(ctl::Run({"list", "--server", "nowhere"}, &terminal), 2);
  EXPECT_THAT(err.str(), HasSubstr("HOST:PORT"));
}

TEST_F(CommandsTest, CheckpointsTellWhyOneCannotBeUsed) {
  coordinator_.list = {MakeJob("job-1", v1::JOB_STATE_RUNNING)};
  for (const int64_t step : {20, 40}) {
    v1::CheckpointManifest& checkpoint = coordinator_.checkpoints.emplace_back();
    checkpoint.mutable_state()->set_step(step);
    checkpoint.set_best(true);
    if (step == 40) checkpoint.set_damage("DATA/blobs/ab/abcd is damaged");
  }
  const Outcome table = Ppctl(coordinator_, {"checkpoints", "job-1"});
  EXPECT_EQ(table.code, 0) << table.err;
  EXPECT_THAT(table.out, testing::ContainsRegex("\n20 .* good"));
  EXPECT_THAT(table.out, testing::ContainsRegex("\n40 .* best .* damaged\n"));
  EXPECT_THAT(table.out, testing::EndsWith("\nstep 40 cannot be used: DATA/blobs/ab/abcd is damaged\n"));
  EXPECT_EQ(Ppctl(coordinator_, {"checkpoints", "job-1", "-o", "name"}).out, "step:20\n");
}

TEST_F(CommandsTest, HelpHasExamplesForEachCommand) {
  std::ostringstream out, err;
  Terminal terminal{&out, &err};
  for (const char* command :
       {"submit", "validate", "plan", "list", "get", "watch", "events", "logs", "metrics", "cancel", "checkpoints", "fetch", "status", "trace", "doctor"}) {
    out.str("");
    EXPECT_EQ(ctl::Run({command, "--help"}, &terminal), 0);
    EXPECT_THAT(out.str(), HasSubstr("Examples:")) << command;
    EXPECT_THAT(out.str(), HasSubstr("Usage")) << command;
  }
}

TEST_F(CommandsTest, ListsEveryPageInEveryFormat) {
  for (int i = 1; i <= 5; ++i) coordinator_.list.push_back(MakeJob("job-" + std::to_string(i), v1::JOB_STATE_RUNNING, 1, i));
  const Json all = Json::parse(Ppctl(coordinator_, {"list", "-o", "json"}).out);
  ASSERT_EQ(all["jobs"].size(), 5u);
  EXPECT_EQ(all["jobs"][4]["id"], "job-5");
  EXPECT_EQ(all["jobs"][0]["status"]["state"], "JOB_STATE_RUNNING");
  EXPECT_EQ(all["jobs"][0]["status"]["total_steps"], "100");
  EXPECT_EQ(all["jobs"][0]["status"]["queue_position"], 0) << "defaults are printed";
  EXPECT_EQ(Ppctl(coordinator_, {"list", "-o", "name"}).out, "job-1\njob-2\njob-3\njob-4\njob-5\n");
  EXPECT_THAT(Ppctl(coordinator_, {"list"}).out, HasSubstr("job-3  name-of-job-3  RUNNING  step 3/100"));
}

TEST_F(CommandsTest, AnEmptyListIsStillData) {
  const Outcome run = Ppctl(coordinator_, {"list", "-o", "json"});
  EXPECT_EQ(Json::parse(run.out)["jobs"].size(), 0u);
  EXPECT_EQ(Ppctl(coordinator_, {"list"}).out, "");
}

TEST_F(CommandsTest, GetPrintsTheResolvedSpecAsYaml) {
  v1::Job job = MakeJob("job-1", v1::JOB_STATE_QUEUED);
  job.mutable_spec()->set_name("true");
  job.mutable_spec()->mutable_training()->set_max_steps(3);
  job.mutable_status()->mutable_reason()->set_message("waits: \"x\"");
  coordinator_.list = {job};
  const std::string yaml = Ppctl(coordinator_, {"get", "job-1", "-o", "yaml"}).out;
  EXPECT_THAT(yaml, HasSubstr("id: job-1\n"));
  EXPECT_THAT(yaml, HasSubstr("\n  state: JOB_STATE_QUEUED\n"));
  EXPECT_THAT(yaml, HasSubstr("\nspec:\n  name: \"true\"\n"));
  EXPECT_THAT(yaml, HasSubstr("\n    max_steps: 3\n"));
  EXPECT_THAT(yaml, HasSubstr("message: \"waits: \\\"x\\\"\""));
  EXPECT_THAT(Ppctl(coordinator_, {"get", "name-of-job-1"}).out, HasSubstr("QUEUED"));
  EXPECT_EQ(Ppctl(coordinator_, {"get", "job-1", "-o", "name"}).out, "job-1\n");
}

TEST_F(CommandsTest, GetTellsWhatAutoCameTo) {
  v1::Job job = MakeJob("job-1", v1::JOB_STATE_SUCCEEDED);
  v1::ParallelSpec* parallel = job.mutable_spec()->mutable_parallel();
  parallel->set_schedule("auto");
  parallel->set_activation_checkpointing("none");
  parallel->set_merge_micro_batches("auto");
  job.mutable_spec()->mutable_precision()->set_compute("auto");
  coordinator_.list = {job};
  EXPECT_THAT(Ppctl(coordinator_, {"get", "job-1", "-o", "yaml"}).out, Not(HasSubstr("planned"))) << "no plan yet";
  for (int rank = 0; rank < 6; ++rank) {
    auto* assignment = coordinator_.list[0].mutable_status()->add_assignment();
    assignment->set_rank(rank);
    assignment->set_stage(rank % 3);
    assignment->set_replica(rank / 3);
    assignment->set_device("cuda:1");
  }
  coordinator_.list[0].mutable_status()->set_schedule("1f1b");
  coordinator_.list[0].mutable_status()->set_microbatches_per_pass(4);
  const std::string yaml = Ppctl(coordinator_, {"get", "job-1", "-o", "yaml"}).out;
  EXPECT_THAT(yaml, HasSubstr("    pipeline_parallel_size: auto  # planned: 3\n"));
  EXPECT_THAT(yaml, HasSubstr("    data_parallel_size: auto  # planned: 2\n"));
  EXPECT_THAT(yaml, HasSubstr("    schedule: auto  # planned: 1f1b\n"));
  EXPECT_THAT(yaml, HasSubstr("    compute: auto  # planned: bf16\n"));
  EXPECT_THAT(yaml, HasSubstr("    activation_checkpointing: none\n")) << "as it was asked";
  EXPECT_THAT(yaml, HasSubstr("    merge_micro_batches: auto  # planned: 4 in a pass\n"));
  const std::string table = Ppctl(coordinator_, {"get", "job-1"}).out;
  EXPECT_THAT(table, HasSubstr("4 in a pass"));
  EXPECT_THAT(table, HasSubstr("stage 2 replica 0"));
  EXPECT_THAT(table, HasSubstr("stage 2 replica 1"));
  coordinator_.list[0].mutable_status()->mutable_assignment()->DeleteSubrange(3, 3);
  EXPECT_THAT(Ppctl(coordinator_, {"get", "job-1"}).out, AllOf(HasSubstr("stage 2"), Not(HasSubstr("replica"))));
}

TEST_F(CommandsTest, AStateMayBeWrittenAsJsonWritesIt) {
  for (const char* word : {"running", "RUNNING", "JOB_STATE_RUNNING", "job_state_running"}) {
    EXPECT_EQ(Ppctl(coordinator_, {"list", "--state", word}).code, 0) << word;
  }
  EXPECT_THAT(Ppctl(coordinator_, {"list", "--state", "JOB_STATE_RUNING"}).err, HasSubstr("did you mean RUNNING?"));
}

TEST_F(CommandsTest, CancelWorkersStatusVersion) {
  EXPECT_EQ(Ppctl(coordinator_, {"cancel", "job-1"}).out, "job-1 CANCELLING\n");
  EXPECT_EQ(Json::parse(Ppctl(coordinator_, {"workers", "list", "-o", "json"}).out)["workers"][0]["name"], "worker-0");
  EXPECT_THAT(Ppctl(coordinator_, {"workers", "list"}).out, HasSubstr("worker-0  ready  cpu:0"));
  EXPECT_THAT(Ppctl(coordinator_, {"status"}).out, HasSubstr("version 1.2.3"));
  coordinator_.Stop();
  EXPECT_EQ(Ppctl(coordinator_, {"version"}).code, 0) << "needs no coordinator";
}

TEST_F(CommandsTest, ModelsAreRegisteredByPathOrUploaded) {
  folder_.Write("m/config.json", "{}");
  ASSERT_EQ(Ppctl(coordinator_, {"models", "register", "m", folder_ / "m"}).code, 0);
  EXPECT_EQ(coordinator_.registered.path(), folder_ / "m");
  EXPECT_THAT(Ppctl(coordinator_, {"models", "upload", "m", folder_ / "m"}).err, HasSubstr("has no *.safetensors"));
  folder_.Write("m/model.safetensors", "weights");
  folder_.Write("m/pytorch_model.bin", "pickle");
  ASSERT_EQ(Ppctl(coordinator_, {"models", "upload", "m", folder_ / "m"}).code, 0);
  std::vector<std::string> names;
  for (const auto& file : coordinator_.registered.files().files()) names.push_back(file.name());
  EXPECT_THAT(names, ElementsAre("config.json", "model.safetensors"));
  EXPECT_EQ(Ppctl(coordinator_, {"models", "upload", "m", folder_ / "none"}).code, 2);
  coordinator_.Fail("RegisterModel", grpc::StatusCode::INVALID_ARGUMENT, "model.safetensors: truncated");
  const Outcome run = Ppctl(coordinator_, {"models", "register", "m", "elsewhere"});
  EXPECT_EQ(run.code, 2);
  EXPECT_THAT(run.err, HasSubstr("truncated"));
}

TEST_F(CommandsTest, DataUploadPrintsIds) {
  const Outcome run = Ppctl(coordinator_, {"data", "upload", folder_.Write("a.jsonl", "{}\n"), folder_.Write("b.jsonl", "{ }\n"), "-o", "name"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("ds-"));
  EXPECT_EQ(coordinator_.blobs.size(), 2u);
  EXPECT_EQ(Ppctl(coordinator_, {"data", "upload", folder_ / "none"}).code, 2);
  EXPECT_THAT(Ppctl(coordinator_, {"data", "upload", folder_.Write("e", "")}).err, HasSubstr("is empty"));
}

TEST_F(CommandsTest, CompletionScriptsKnowTheCommands) {
  coordinator_.Stop();
  const Outcome bash = Ppctl(coordinator_, {"completion", "bash"});
  EXPECT_EQ(bash.code, 0);
  EXPECT_THAT(bash.out, HasSubstr("\"data show\")"));
  EXPECT_EQ(std::system(("bash -n " + folder_.Write("c.bash", bash.out)).c_str()), 0);
  EXPECT_THAT(Ppctl(coordinator_, {"completion", "zsh"}).out, Not(HasSubstr("mapfile")));
  EXPECT_THAT(Ppctl(coordinator_, {"completion", "fish"}).out, HasSubstr("-a submit"));
  EXPECT_EQ(Ppctl(coordinator_, {"completion", "csh"}).code, 2);
}

}  // namespace
}  // namespace ppft::ctl
