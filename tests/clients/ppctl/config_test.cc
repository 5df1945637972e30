// Contexts, the token, and the plot of a job's history.
#include "clients/ppctl/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "clients/ppctl/format.h"
#include "clients/ppctl/plot.h"
#include "tests/clients/ppctl/fake_coordinator.h"

namespace ppft::ctl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class ConfigTest : public ::testing::Test {
 protected:
  ConfigTest() { setenv("PPCTL_CONFIG", (folder_ / "config.yaml").c_str(), 1); }
  ~ConfigTest() override { unsetenv("PPCTL_CONFIG"); }

  // Without a --server of its own.
  Outcome Run(const std::vector<std::string>& arguments) {
    std::ostringstream out, err;
    Terminal terminal{&out, &err};
    Outcome outcome;
    outcome.code = ctl::Run(arguments, &terminal);
    outcome.out = out.str();
    outcome.err = err.str();
    return outcome;
  }

  FakeCoordinator coordinator_;
  TempFolder folder_;
};

TEST_F(ConfigTest, ContextsAreSetUsedAndDeleted) {
  EXPECT_THAT(Run({"config", "list"}).err, HasSubstr("no contexts in " + (folder_ / "config.yaml")));
  ASSERT_EQ(Run({"config", "set", "far", "server=far:7070"}).code, 0);
  ASSERT_EQ(Run({"config", "set", "near", "server=" + coordinator_.address(), "timeout=7s"}).code, 0);
  EXPECT_EQ(Run({"status", "--context", "near"}).code, 0);
  EXPECT_THAT(Run({"config", "list"}).out, HasSubstr("*  far"));
  ASSERT_EQ(Run({"config", "use", "near"}).code, 0);
  EXPECT_EQ(Run({"status"}).code, 0);
  EXPECT_THAT(Run({"config", "list"}).out, HasSubstr("near  " + coordinator_.address() + "  timeout=7s"));
  EXPECT_EQ(nlohmann::json::parse(Run({"config", "list", "-o", "json"}).out)["current_context"], "near");
  EXPECT_EQ(Run({"config", "list", "-o", "name"}).out, "far\nnear\n");
  ASSERT_EQ(Run({"config", "set", "near", "timeout="}).code, 0);
  EXPECT_THAT(Run({"config", "list"}).out, Not(HasSubstr("7s")));
  ASSERT_EQ(Run({"config", "delete", "near"}).code, 0);
  EXPECT_EQ(Run({"status", "--context", "near"}).code, 2);
}

TEST_F(ConfigTest, AFlagCountsBeforeTheEnvironmentBeforeTheContext) {
  ASSERT_EQ(Run({"config", "set", "lab", "server=nowhere", "output=name"}).code, 0);
  EXPECT_THAT(Run({"status"}).err, HasSubstr("\"nowhere\" is not HOST:PORT"));
  setenv("PPCTL_SERVER", coordinator_.address().c_str(), 1);
  EXPECT_EQ(Run({"status"}).code, 0);
  EXPECT_THAT(Run({"status", "--server", "elsewhere"}).err, HasSubstr("\"elsewhere\""));
  unsetenv("PPCTL_SERVER");
  coordinator_.list = {MakeJob("job-1", v1::JOB_STATE_RUNNING)};
  EXPECT_EQ(Run({"list", "--server", coordinator_.address()}).out, "job-1\n");
  EXPECT_THAT(Run({"list", "--server", coordinator_.address(), "-o", "table"}).out, HasSubstr("NAME"));
}

TEST_F(ConfigTest, WhatIsWrongIsNamedWithItsPlace) {
  const std::pair<const char*, const char*> cases[] = {{"contexts: {lab: {sever: x}}", "contexts.lab.sever is not a known key; did you mean server?"},
                                                       {"current: x", "config.yaml:1: current is not a known key"},
                                                       {"contexts: [a]", "contexts must be a group"},
                                                       {"contexts:\n  lab: {server: [a]}", "config.yaml:2: contexts.lab.server must be one value"},
                                                       {"contexts: {", "config.yaml:"},
                                                       {"current_context: lab", "there is no context \"lab\""}};
  for (const auto& [text, says] : cases) {
    folder_.Write("config.yaml", text);
    const Outcome run = Run({"status"});
    EXPECT_EQ(run.code, 2) << text;
    EXPECT_THAT(run.err, HasSubstr(says));
  }
  folder_.Write("config.yaml", "");
  EXPECT_THAT(Run({"config", "set", "lab", "servr=x"}).err, HasSubstr("did you mean server?"));
  EXPECT_EQ(Run({"config", "set", "a b", "server=x"}).code, 2);
  EXPECT_EQ(Run({"config", "use", "lab"}).code, 2);
}

TEST_F(ConfigTest, PathsCountFromTheFile) {
  folder_.Write("config.yaml", "contexts: {lab: {tls_ca: ca.pem, token_file: /abs/token}}");
  const auto config = LoadConfig(folder_ / "config.yaml");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->contexts.at("lab").at("tls_ca"), folder_ / "ca.pem");
  EXPECT_EQ(config->contexts.at("lab").at("token_file"), "/abs/token");
}

TEST_F(ConfigTest, TheTokenGoesWithEachCallButNeverUnencryptedToOthers) {
  const std::string file = folder_.Write("token", "s3cret-token\nnot this\n");
  EXPECT_EQ(Run({"status", "--server", coordinator_.address(), "--token-file", file}).code, 0);
  EXPECT_EQ(coordinator_.authorization, "Bearer s3cret-token");
  EXPECT_EQ(Run({"status", "--server", coordinator_.address()}).code, 0);
  EXPECT_EQ(coordinator_.authorization, "");
  const Outcome far = Run({"status", "--server", "far.example:7070", "--token-file", file});
  EXPECT_EQ(far.code, 2);
  EXPECT_THAT(far.err, HasSubstr("unencrypted"));
  EXPECT_THAT(far.err, Not(HasSubstr("s3cret")));
  EXPECT_EQ(Run({"status", "--server", coordinator_.address(), "--token-file", folder_ / "none"}).code, 2);
  EXPECT_EQ(Run({"status", "--server", coordinator_.address(), "--token-file", folder_.Write("bad", "two words\n")}).code, 2);
}

TEST_F(ConfigTest, MetricsArePlotted) {
  coordinator_.list = {MakeJob("job-1", v1::JOB_STATE_RUNNING)};
  EXPECT_THAT(Run({"metrics", "job-1", "--plot", "--server", coordinator_.address()}).err, HasSubstr("no steps yet"));
  for (int step = 1; step <= 50; ++step) {
    v1::MetricRow& row = coordinator_.rows.emplace_back();
    row.set_step(step);
    row.set_loss(4.0 / step);
    if (step % 25 == 0) coordinator_.rows.back().set_eval_loss(2.5);
  }
  const Outcome run = Run({"metrics", "job-1", "--plot", "--server", coordinator_.address()});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("step 50"));
  EXPECT_THAT(run.out, HasSubstr("o eval_loss"));
}

TEST(PlotTest, PointsLieWhereTheyBelong) {
  const std::string falling = Plot({{"loss", {{0, 10}, {10, 0}}}}, 20, 2);
  std::vector<std::string> lines;
  std::istringstream text(falling);
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  ASSERT_EQ(lines.size(), 5u);
  EXPECT_EQ(lines[0], "10 ┤⠁");
  EXPECT_EQ(lines[1], " 0 ┤              ⢀");
  EXPECT_THAT(lines[3], HasSubstr("step 10"));
  EXPECT_EQ(lines[4], "    ⠒ loss");
  EXPECT_THAT(Plot({{"a", {{0, 1}}}, {"b", {{0, 1}}}}, 20, 3), HasSubstr("o b"));
  EXPECT_EQ(Plot({{"loss", {}}}, 20, 2), "");
  EXPECT_EQ(Plot({{"loss", {{1, std::nan("")}}}}, 20, 2), "");
  for (const size_t width : {0, 1, 12, 500}) EXPECT_NE(Plot({{"loss", {{0, 1}, {1, 1}, {2, 1e30}}}}, width, 5), "");
}

}  // namespace
}  // namespace ppft::ctl
