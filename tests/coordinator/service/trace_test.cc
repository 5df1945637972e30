// Traces through the services: fake workers are told, answer, die, and the caller gets all ranks together.
#include <gmock/gmock.h>

#include <future>

#include "tests/coordinator/service/fake_worker.h"
#include "tests/coordinator/service/test_service.h"

namespace ppft::coordinator {
namespace {

using testing::HasSubstr;

struct Answer {
  grpc::Status status;
  std::vector<v1::TraceJobResponse> parts;
};

class TraceServiceTest : public ServiceTest {
 protected:
  void SetUp() override {
    Up();
    Register();
    for (int i = 0; i < 2; ++i) workers_.push_back(std::make_unique<FakeWorker>(address_, absl::StrCat("worker-", i), "first"));
    for (const auto& worker : workers_) ASSERT_TRUE(worker->WaitForWelcome());
  }
  ~TraceServiceTest() override {
    workers_.clear();
    Down();
  }

  // A two-stage job that runs at epoch 1.
  std::string RunningJob() {
    const std::string id = Submit(Spec(2));
    WaitFor(id, v1::JOB_STATE_STARTING);
    v1::TrainerReport ready;
    ready.mutable_ready();
    for (int rank = 0; rank < 2; ++rank) {
      workers_[rank]->WaitForRank(rank, 1);
      workers_[rank]->Report(Key(id, 1, rank), ready);
    }
    WaitFor(id, v1::JOB_STATE_RUNNING);
    return id;
  }

  std::future<Answer> Ask(const std::string& id, int steps, absl::Duration limit = absl::Seconds(60)) {
    return std::async(std::launch::async, [this, id, steps, limit] {
      grpc::ClientContext context;
      net::SetDeadline(&context, limit);
      v1::TraceJobRequest request;
      request.set_id(id);
      request.set_num_steps(steps);
      Answer answer;
      auto stream = jobs_->TraceJob(&context, request);
      v1::TraceJobResponse part;
      while (stream->Read(&part)) answer.parts.push_back(part);
      answer.status = stream->Finish();
      return answer;
    });
  }

  v1::TrainerReport Part(int64_t id, bool last, const std::string& name) {
    v1::TrainerReport report;
    report.mutable_trace()->set_id(id);
    report.mutable_trace()->set_first_step(4);
    report.mutable_trace()->set_last_step(5);
    report.mutable_trace()->set_last(last);
    report.mutable_trace()->add_spans()->set_name(name);
    return report;
  }

  std::vector<std::unique_ptr<FakeWorker>> workers_;
};

TEST_F(TraceServiceTest, RanksAreToldAndAnswerTogether) {
  const std::string id = RunningJob();
  auto asked = Ask(id, 2);
  const v1::TraceOrder order = workers_[0]->WaitForTrace(0);
  EXPECT_EQ(order.num_steps(), 2);
  EXPECT_GT(order.id(), 0);
  EXPECT_EQ(workers_[1]->WaitForTrace(1).id(), order.id());
  EXPECT_THAT(Ask(id, 1).get().status.error_message(), HasSubstr("another trace"));
  workers_[0]->Report(Key(id, 1, 0), Part(order.id(), false, "a"));
  workers_[0]->Report(Key(id, 1, 0), Part(order.id() + 1, true, "of another trace"));
  workers_[1]->Report(Key(id, 1, 1), Part(order.id(), true, "b"));
  workers_[0]->Report(Key(id, 1, 0), Part(order.id(), true, "c"));
  const Answer answer = asked.get();
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  ASSERT_EQ(answer.parts.size(), 3u);
  // Each rank's parts in their order, whatever the other's.
  std::map<std::string, std::string> names;
  for (const v1::TraceJobResponse& part : answer.parts) names[part.rank().worker()] += part.trace().spans(0).name();
  EXPECT_THAT(names, testing::ElementsAre(testing::Pair("worker-0", "ac"), testing::Pair("worker-1", "b")));
  EXPECT_EQ(workers_[0]->WaitForTrace(0, false).id(), 0) << "what is over is not wanted any more";
  auto again = Ask(id, 1);
  const int64_t next = workers_[0]->WaitForTrace(0).id();
  EXPECT_GT(next, order.id());
  for (int rank = 0; rank < 2; ++rank) workers_[rank]->Report(Key(id, 1, rank), Part(next, true, "d"));
  EXPECT_EQ(again.get().parts.size(), 2u);
}

TEST_F(TraceServiceTest, ACallerWhoGoesAwayEndsIt) {
  const std::string id = RunningJob();
  auto asked = Ask(id, 2, absl::Seconds(2));
  workers_[0]->WaitForTrace(0);
  EXPECT_EQ(asked.get().status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(workers_[0]->WaitForTrace(0, false).id(), 0);
}

TEST_F(TraceServiceTest, TheNextAttemptAnswersAnew) {
  const std::string id = RunningJob();
  auto asked = Ask(id, 2);
  const v1::TraceOrder order = workers_[0]->WaitForTrace(0);
  workers_[0]->Report(Key(id, 1, 0), Part(order.id(), true, "old"));
  v1::TrainerReport killed;
  killed.mutable_exited()->set_signal(9);
  workers_[1]->Report(Key(id, 1, 1), killed);
  const int64_t epoch = WaitUntil(id, [](const v1::Job& job) { return job.status().attempt_epoch() > 1 && job.status().state() == v1::JOB_STATE_STARTING; })
                            .status()
                            .attempt_epoch();
  for (int rank = 0; rank < 2; ++rank) {
    const v1::RankDirective directive = workers_[rank]->WaitForRank(rank, epoch);
    EXPECT_EQ(directive.trace().id(), order.id());
    workers_[rank]->Report(Key(id, epoch, rank), Part(order.id(), true, "new"));
  }
  const Answer answer = asked.get();
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  ASSERT_EQ(answer.parts.size(), 2u);
  for (const v1::TraceJobResponse& part : answer.parts) EXPECT_EQ(part.trace().spans(0).name(), "new");
}

TEST_F(TraceServiceTest, WhatCannotBeTracedIsRefused) {
  const std::string id = RunningJob();
  EXPECT_EQ(Ask(id, 101).get().status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Ask("job-nothere", 1).get().status.error_code(), grpc::StatusCode::NOT_FOUND);
  auto asked = Ask(id, 1);
  workers_[0]->WaitForTrace(0);
  grpc::ClientContext context;
  v1::CancelJobRequest cancel;
  cancel.set_id(id);
  cancel.set_request_id("c");
  v1::Job job;
  ASSERT_TRUE(jobs_->CancelJob(&context, cancel, &job).ok());
  const Answer ended = asked.get();
  EXPECT_EQ(ended.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(ended.status.error_message(), HasSubstr("CANCELLED: it ended before"));
  EXPECT_THAT(Ask(id, 1).get().status.error_message(), HasSubstr("no step left to trace"));
}

TEST_F(TraceServiceTest, WorkersShowTheirHostAndWhatTheyLack) {
  FakeWorker bare(address_, "bare", "first", 0, "--devices cuda:all: no NVIDIA driver on this machine");
  EXPECT_EQ(bare.welcome_acked(), 0);
  grpc::ClientContext context, again;
  v1::ListWorkersResponse response;
  ASSERT_TRUE(cluster_->ListWorkers(&context, v1::ListWorkersRequest(), &response).ok());
  ASSERT_EQ(response.workers_size(), 3);
  EXPECT_EQ(response.workers(0).name(), "bare");
  EXPECT_EQ(response.workers(0).state(), "unusable");
  EXPECT_EQ(response.workers(0).problems(0), "--devices cuda:all: no NVIDIA driver on this machine");
  EXPECT_EQ(response.workers(1).state(), "ready");
  v1::CheckFilesResponse files;
  ASSERT_TRUE(cluster_->CheckFiles(&again, v1::CheckFilesRequest(), &files).ok());
  EXPECT_EQ(files.num_models(), 1);
  EXPECT_EQ(files.num_datasets(), 1);
}

}  // namespace
}  // namespace ppft::coordinator
