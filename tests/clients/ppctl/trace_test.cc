// A trace as other programs read it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "clients/ppctl/chrome_trace.h"
#include "tests/clients/ppctl/fake_coordinator.h"

namespace ppft::ctl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

constexpr int64_t kStart = 1800000000000000000;

v1::TraceJobResponse Rank(int rank) {
  v1::TraceJobResponse part;
  part.mutable_rank()->set_rank(rank);
  part.mutable_rank()->add_stages(rank);
  part.mutable_rank()->set_worker("worker-" + std::to_string(rank));
  part.mutable_rank()->set_device("cpu:0");
  part.mutable_trace()->set_first_step(7);
  part.mutable_trace()->set_last_step(7);
  part.mutable_trace()->set_last(true);
  return part;
}

void Add(v1::TraceJobResponse* part, v1::TraceRow row, const std::string& name, int64_t begin, int64_t duration, int stage = -1, bool evaluation = false) {
  v1::TraceSpan* span = part->mutable_trace()->add_spans();
  span->set_row(row);
  span->set_name(name);
  span->set_step(7);
  span->set_stage(stage);
  span->set_microbatch(stage < 0 ? -1 : 0);
  span->set_begin_unix_nanos(kStart + begin);
  span->set_duration_nanos(duration);
  span->set_evaluation(evaluation);
}

// Rank 1's clock is a second behind.
std::vector<v1::TraceJobResponse> TwoRanks() {
  std::vector<v1::TraceJobResponse> parts = {Rank(0), Rank(1)};
  Add(&parts[0], v1::TRACE_ROW_COMPUTE, "0F0", 0, 5000, 0);
  Add(&parts[0], v1::TRACE_ROW_SEND, "0SEND_F0", 5000, 100, 0);
  Add(&parts[0], v1::TRACE_ROW_OPTIMIZER, "optimizer", 20000, 1000);
  Add(&parts[1], v1::TRACE_ROW_RECEIVE, "1RECV_F0", 1000 - 1000000000, 5000, 1);
  Add(&parts[1], v1::TRACE_ROW_COMPUTE, "1F0", 6000 - 1000000000, 4500, 1);
  Add(&parts[1], v1::TRACE_ROW_EVALUATION, "evaluation", 30000 - 1000000000, 9000);
  Add(&parts[1], v1::TRACE_ROW_COMPUTE, "1F0", 31000 - 1000000000, 4000, 1, true);
  parts[1].mutable_clock()->set_offset_nanos(1000000000);
  parts[1].mutable_clock()->set_error_nanos(250);
  return parts;
}

Json Only(const Json& trace, const std::function<bool(const Json&)>& wanted) {
  Json out = Json::array();
  for (const Json& event : trace["traceEvents"]) {
    if (wanted(event)) out.push_back(event);
  }
  return out;
}

TEST(ChromeTraceTest, RanksAreProcessesWithNamedRows) {
  const Json trace = Json::parse(ChromeTrace("job-1", TwoRanks()));
  const Json names = Only(trace, [](const Json& event) { return event["name"] == "process_name"; });
  ASSERT_EQ(names.size(), 2u);
  EXPECT_EQ(names[1]["args"]["name"], "rank 1: stage 1 on worker-1 cpu:0");
  std::vector<std::string> rows;
  for (const Json& event : Only(trace, [](const Json& event) { return event["name"] == "thread_name" && event["pid"] == 0; }))
    rows.push_back(event["args"]["name"]);
  EXPECT_THAT(rows, ElementsAre("steps", "compute", "sends", "receives", "collectives", "optimizer", "evaluation", "checkpoint"));
  EXPECT_EQ(trace["otherData"]["job"], "job-1");
  EXPECT_EQ(trace["otherData"]["begin_unix_nanos"], kStart);
  EXPECT_EQ(trace["otherData"]["times"], "host");
  EXPECT_EQ(trace["otherData"]["clock_offset_nanos_of_rank_1"], 1000000000);
}

TEST(ChromeTraceTest, TimesAreOnOneClockInMicroseconds) {
  const Json trace = Json::parse(ChromeTrace("job-1", TwoRanks()));
  const Json forward = Only(trace, [](const Json& event) { return event["name"] == "1F0" && !event["args"].contains("evaluation"); });
  ASSERT_EQ(forward.size(), 1u);
  EXPECT_EQ(forward[0]["ph"], "X");
  EXPECT_EQ(forward[0]["cat"], "compute");
  EXPECT_DOUBLE_EQ(forward[0]["ts"], 6.0);
  EXPECT_DOUBLE_EQ(forward[0]["dur"], 4.5);
  EXPECT_EQ(forward[0]["args"]["stage"], 1);
  EXPECT_EQ(forward[0]["args"]["microbatch"], 0);
  const Json steps = Only(trace, [](const Json& event) { return event["name"] == "step 7"; });
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_DOUBLE_EQ(steps[0]["dur"], 21.0);
  EXPECT_DOUBLE_EQ(steps[1]["ts"], 1.0);
  EXPECT_DOUBLE_EQ(steps[1]["dur"], 9.5) << "an evaluation is not part of its step";
}

TEST(ChromeTraceTest, AMessageHasAnArrow) {
  const Json trace = Json::parse(ChromeTrace("job-1", TwoRanks()));
  const Json ends = Only(trace, [](const Json& event) { return event["ph"] == "s" || event["ph"] == "f"; });
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_EQ(ends[0]["pid"], 0);
  EXPECT_DOUBLE_EQ(ends[0]["ts"], 5.0);
  EXPECT_EQ(ends[1]["pid"], 1);
  EXPECT_DOUBLE_EQ(ends[1]["ts"], 6.0);
  EXPECT_EQ(ends[0]["id"], ends[1]["id"]);
}

TEST(ChromeTraceTest, TheSummaryTellsTheShares) {
  const std::string summary = TraceSummary(TwoRanks());
  EXPECT_THAT(summary, HasSubstr("COMPUTE"));
  EXPECT_THAT(summary, HasSubstr("23.8 %"));  // 5 of 21 microseconds
  EXPECT_EQ(TraceSummary({Rank(0)}), "");
}

class TraceTest : public ::testing::Test {
 protected:
  TraceTest() { coordinator_.list = {MakeJob("job-1", v1::JOB_STATE_RUNNING, 1, 6)}; }
  FakeCoordinator coordinator_;
  TempFolder folder_;
};

TEST_F(TraceTest, WritesTheFileAndSaysWhereToOpenIt) {
  coordinator_.trace = TwoRanks();
  const Outcome run = Ppctl(coordinator_, {"trace", "job-1", "--steps", "1", "-o", folder_ / "t.json"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.out, "");
  EXPECT_THAT(run.err, HasSubstr("tracing 1 step of job-1, which is RUNNING at step 6"));
  EXPECT_THAT(run.err, HasSubstr("ui.perfetto.dev"));
  EXPECT_EQ(coordinator_.traced.num_steps(), 1);
  EXPECT_EQ(Json::parse(ReadAll(folder_ / "t.json"))["otherData"]["first_step"], 7);
  EXPECT_EQ(Json::parse(Ppctl(coordinator_, {"trace", "name-of-job-1", "-o", "-"}).out)["otherData"]["job"], "job-1");
  EXPECT_EQ(coordinator_.traced.num_steps(), 3) << "the default";
}

TEST_F(TraceTest, WhatCannotBeTracedIsAnErrorAndWritesNothing) {
  coordinator_.trace = {Rank(0)};
  coordinator_.trace[0].mutable_trace()->set_first_step(0);
  const Outcome late = Ppctl(coordinator_, {"trace", "job-1", "-o", folder_ / "t.json"});
  EXPECT_EQ(late.code, 7);
  EXPECT_THAT(late.err, HasSubstr("before the trace could begin"));
  coordinator_.Fail("TraceJob", grpc::StatusCode::FAILED_PRECONDITION, "it has no step left to trace");
  EXPECT_EQ(Ppctl(coordinator_, {"trace", "job-1", "-o", folder_ / "t.json"}).code, 7);
  EXPECT_EQ(ReadAll(folder_ / "t.json"), "");
  EXPECT_EQ(Ppctl(coordinator_, {"trace", "job-9"}).code, 3);
  EXPECT_EQ(Ppctl(coordinator_, {"trace", "job-1", "--steps", "0"}).code, 2);
}

}  // namespace
}  // namespace ppft::ctl
