#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/clients/ppctl/fake_coordinator.h"

namespace ppft::ctl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class WatchTest : public ::testing::Test {
 protected:
  WatchTest() { coordinator_.list = {MakeJob("job-1", v1::JOB_STATE_RUNNING)}; }
  ~WatchTest() override { Interrupted() = false; }

  static int Count(const std::string& text, const std::string& part) {
    int count = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
    return count;
  }

  FakeCoordinator coordinator_;
};

TEST_F(WatchTest, EndsWithTheJobsFate) {
  const std::pair<v1::JobState, int> fates[] = {{v1::JOB_STATE_SUCCEEDED, 0}, {v1::JOB_STATE_FAILED, 8}, {v1::JOB_STATE_CANCELLED, 8}};
  for (const auto& [state, code] : fates) {
    coordinator_.watches = {{MakeJob("job-1", state)}};
    EXPECT_EQ(Ppctl(coordinator_, {"watch", "job-1"}).code, code);
  }
}

TEST_F(WatchTest, AFailureNamesItsReasonAndRemedy) {
  v1::Job job = MakeJob("job-1", v1::JOB_STATE_FAILED);
  job.mutable_status()->mutable_reason()->set_code("DATASET_INVALID");
  job.mutable_status()->mutable_reason()->set_message("train.jsonl: row 3");
  job.mutable_status()->mutable_reason()->set_remedy("repair the row");
  coordinator_.watches = {{job}};
  const Outcome run = Ppctl(coordinator_, {"watch", "job-1"});
  EXPECT_THAT(run.err, HasSubstr("DATASET_INVALID: train.jsonl: row 3\nWhat to do: repair the row"));
  EXPECT_EQ(run.out, "");
}

TEST_F(WatchTest, ACutStreamGoesOnAfterTheLastNews) {
  coordinator_.watches = {
      {MakeJob("job-1", v1::JOB_STATE_RUNNING, 5, 10)}, {}, {MakeJob("job-1", v1::JOB_STATE_RUNNING, 9, 20)}, {MakeJob("job-1", v1::JOB_STATE_SUCCEEDED, 12)}};
  const Outcome run = Ppctl(coordinator_, {"watch", "job-1"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(coordinator_.watched_after, ElementsAre(0, 5, 5, 9));
  EXPECT_EQ(Count(run.err, "lost the connection"), 2) << "once for each loss, not for each try\n" << run.err;
  EXPECT_EQ(Count(run.err, "connected again"), 2);
}

TEST_F(WatchTest, ARestartOfTheCoordinatorDoesNotEndIt) {
  coordinator_.watches = {{MakeJob("job-1", v1::JOB_STATE_RUNNING, 5, 10)}};
  Outcome run;
  std::thread watcher([&] { run = Ppctl(coordinator_, {"watch", "job-1"}); });
  while (coordinator_.calls("WatchJob") < 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const int port = coordinator_.port();
  coordinator_.Stop();
  coordinator_.watches = {{MakeJob("job-1", v1::JOB_STATE_SUCCEEDED, 6)}};
  coordinator_.Start(port);
  watcher.join();
  EXPECT_EQ(run.code, 0) << run.err;
}

TEST_F(WatchTest, CtrlCDetachesAndSaysSo) {
  coordinator_.before_watch = [] { Interrupted() = true; };
  const Outcome run = Ppctl(coordinator_, {"watch", "job-1"});
  EXPECT_EQ(run.code, 130);
  EXPECT_THAT(run.err, HasSubstr("detached: job-1 goes on"));
}

TEST_F(WatchTest, AnUnknownJobEndsAtOnce) {
  EXPECT_EQ(Ppctl(coordinator_, {"watch", "job-9"}).code, 3);
  coordinator_.Fail("WatchJob", grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Ppctl(coordinator_, {"watch", "job-1"}).code, 3);
}

TEST_F(WatchTest, AServerThatAlwaysFailsOddlyIsGivenUp) {
  for (int i = 0; i < 5; ++i) coordinator_.Fail("WatchJob", grpc::StatusCode::INTERNAL, "broken");
  const Outcome run = Ppctl(coordinator_, {"watch", "job-1"});
  EXPECT_EQ(run.code, 1);
  EXPECT_THAT(run.err, HasSubstr("broken"));
}

TEST_F(WatchTest, LogsGoOnAfterTheLastLine) {
  for (int i = 1; i <= 3; ++i) {
    v1::LogLine line;
    line.set_seq(i);
    line.set_source("rank-0");
    line.set_text("line " + std::to_string(i) + "\x1b[2J");
    coordinator_.logs.push_back(line);
  }
  coordinator_.Fail("StreamLogs", grpc::StatusCode::UNAVAILABLE);
  const Outcome run = Ppctl(coordinator_, {"logs", "-f", "job-1"});
  EXPECT_EQ(run.code, 0) << run.err;
  for (int i = 1; i <= 3; ++i) EXPECT_EQ(Count(run.out, "line " + std::to_string(i)), 1);
  EXPECT_EQ(Count(run.out, "\x1b"), 0);
}

}  // namespace
}  // namespace ppft::ctl
