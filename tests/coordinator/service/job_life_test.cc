// Jobs from submit to their end, driven by fake workers over real gRPC and a real store.
#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>

#include "tests/coordinator/service/fake_worker.h"
#include "tests/coordinator/service/test_service.h"

namespace ppft::coordinator {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

v1::RankKey Key(const std::string& job, int64_t epoch, int rank) {
  v1::RankKey key;
  key.set_job_id(job);
  key.set_epoch(epoch);
  key.set_rank(rank);
  return key;
}

v1::TrainerReport Step(int64_t step, double loss = 1) {
  v1::TrainerReport report;
  report.mutable_step()->mutable_row()->set_step(step);
  report.mutable_step()->mutable_row()->set_loss(loss);
  return report;
}

v1::TrainerReport Checkpoint(int64_t step, int rank) {
  v1::TrainerReport report;
  report.mutable_checkpoint()->mutable_state()->set_step(step);
  report.mutable_checkpoint()->add_files()->mutable_content()->set_sha256(absl::StrCat("checkpoint-", step, "-", rank));
  return report;
}

v1::TrainerReport Finished(int64_t step) {
  v1::TrainerReport report;
  report.mutable_finished()->mutable_state()->set_step(step);
  report.mutable_finished()->set_reason("max_steps");
  return report;
}

v1::TrainerReport Exported(int rank) {
  v1::TrainerReport report;
  report.mutable_exported()->add_adapter_files()->mutable_content()->set_sha256(absl::StrCat("export-", rank));
  return report;
}

v1::TrainerReport Killed(int signal) {
  v1::TrainerReport report;
  report.mutable_exited()->set_signal(signal);
  return report;
}

v1::TrainerReport BrokenLink() {
  v1::TrainerReport report;
  *report.mutable_failure()->mutable_reason() = MakeReason("COMM_ERROR", "rank 1: closed");
  return report;
}

class JobLifeTest : public ServiceTest {
 protected:
  void Begin() {
    Up();
    Register();
    for (int i = 0; i < 2; ++i) workers_.push_back(std::make_unique<FakeWorker>(address_, absl::StrCat("worker-", i), "first"));
  }
  ~JobLifeTest() override { workers_.clear(); }

  // From STARTING at `epoch` to RUNNING.
  void MakeReady(const std::string& id, int64_t epoch) {
    for (int rank = 0; rank < 2; ++rank) {
      workers_[rank]->WaitForRank(rank, epoch);
      v1::TrainerReport listening;
      listening.mutable_listening()->set_address(absl::StrCat("127.0.0.1:", 9000 + rank));
      workers_[rank]->Report(Key(id, epoch, rank), listening);
    }
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(workers_[rank]->WaitForRank(rank, epoch, /*with_peers=*/true).peers_size(), 2);
      v1::TrainerReport ready;
      ready.mutable_ready();
      workers_[rank]->Report(Key(id, epoch, rank), ready);
    }
    WaitFor(id, v1::JOB_STATE_RUNNING);
  }
  void Save(const std::string& id, int64_t epoch, int64_t step) {
    for (int rank = 0; rank < 2; ++rank) workers_[rank]->Report(Key(id, epoch, rank), Checkpoint(step, rank));
    WaitUntil(id, [step](const v1::Job& job) { return job.status().checkpoint_step() == step; });
  }
  void Finish(const std::string& id, int64_t epoch) {
    workers_[1]->Report(Key(id, epoch, 1), Finished(100));
    for (int rank = 0; rank < 2; ++rank) workers_[rank]->Report(Key(id, epoch, rank), Exported(rank));
    WaitFor(id, v1::JOB_STATE_SUCCEEDED);
  }

  std::vector<std::unique_ptr<FakeWorker>> workers_;
};

TEST_F(JobLifeTest, FromSubmitToSucceeded) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  workers_[1]->Report(Key(id, 1, 1), Step(1, 3.0));
  workers_[1]->Report(Key(id, 1, 1), Step(2, 2.0));
  Save(id, 1, 2);
  Save(id, 1, 4);
  Finish(id, 1);
  EXPECT_EQ(Road(id), "PREPARING QUEUED STARTING RUNNING EXPORTING SUCCEEDED");
  const v1::Job job = Get(id);
  EXPECT_EQ(job.status().step(), 100);
  EXPECT_EQ(job.status().loss(), 2.0);
  EXPECT_EQ(job.status().assignment_size(), 2);
  EXPECT_TRUE(job.has_start_time());
  EXPECT_TRUE(job.has_end_time());
  EXPECT_THAT(MetricSteps(id), ElementsAre(1, 2));
  for (const auto& worker : workers_) EXPECT_TRUE(worker->WaitForNothing()) << "a rank that is not named must stop";
  const auto artifacts = controller_->Run([&](JobStore& store) { return store.ListArtifacts(id); });
  ASSERT_EQ(artifacts->size(), 1u);
  EXPECT_EQ(artifacts->front().files_size(), 2);
  const auto checkpoints = controller_->Run([&](JobStore& store) { return store.ListCheckpoints(id); });
  ASSERT_EQ(checkpoints->size(), 1u) << "save_total_limit 1";
  EXPECT_EQ(checkpoints->front().state().step(), 4);
  Down();  // waits for the pool
  EXPECT_TRUE(work_.was_deleted("checkpoint-2-0"));
  EXPECT_FALSE(work_.was_deleted("checkpoint-4-0"));
  EXPECT_FALSE(work_.was_deleted("export-0"));
}

TEST_F(JobLifeTest, AKilledTrainerCostsTheStepsSinceTheCheckpoint) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  for (int step = 1; step <= 3; ++step) workers_[1]->Report(Key(id, 1, 1), Step(step));
  Save(id, 1, 2);
  workers_[0]->Report(Key(id, 1, 0), Checkpoint(3, 0));  // of one rank only: never committed
  // The survivor speaks first; the cause comes later.
  workers_[0]->Report(Key(id, 1, 0), BrokenLink());
  workers_[1]->Report(Key(id, 1, 1), Killed(SIGKILL));
  EXPECT_EQ(workers_[0]->WaitForRank(0, 2).resume().state().step(), 2);
  EXPECT_THAT(MetricSteps(id), ElementsAre(1, 2)) << "rows after the checkpoint are gone";
  EXPECT_EQ(Get(id).status().step(), 2);
  workers_[1]->Report(Key(id, 1, 1), Step(50));  // a zombie
  MakeReady(id, 2);
  Finish(id, 2);
  EXPECT_THAT(MetricSteps(id), ElementsAre(1, 2));
  EXPECT_EQ(Road(id), "PREPARING QUEUED STARTING RUNNING RECOVERING QUEUED STARTING RUNNING EXPORTING SUCCEEDED");
  const std::vector<v1::Event> events = Events(id);
  for (const v1::Event& event : events) {
    if (event.to() != v1::JOB_STATE_RECOVERING || event.from() == event.to()) continue;
    EXPECT_EQ(event.reason().code(), "WORKER_CRASHED") << "the first cause, not what followed from it";
    EXPECT_THAT(event.reason().message(), HasSubstr("signal 9"));
  }
  EXPECT_EQ(Get(id).status().restarts(), 1);
}

TEST_F(JobLifeTest, RecoveryWaitsUntilNoOldRankCanAct) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  workers_[0]->set_stubborn(true);
  workers_[1]->Report(Key(id, 1, 1), Killed(SIGKILL));
  WaitFor(id, v1::JOB_STATE_RECOVERING);
  workers_[1]->WaitForNothing();
  EXPECT_EQ(Get(id).status().state(), v1::JOB_STATE_RECOVERING) << "rank 0 of the old epoch still runs";
  workers_[0]->set_stubborn(false);
  MakeReady(id, 2);
}

TEST_F(JobLifeTest, ANewIncarnationEndsTheOldOnesRanks) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  workers_[1] = std::make_unique<FakeWorker>(address_, "worker-1", "second");
  MakeReady(id, 2);
  EXPECT_THAT(Road(id), HasSubstr("RUNNING RECOVERING QUEUED STARTING RUNNING"));
}

TEST_F(JobLifeTest, ASilentWorkerIsLostWhenItsLeaseEnds) {
  options_.lease = absl::Milliseconds(800);
  Begin();
  const std::string id = Submit(Spec(1, "priority: 60\n"));
  workers_[0]->WaitForRank(0, 1);
  workers_[0]->Disconnect();
  const v1::RankDirective moved = workers_[1]->WaitForRank(0, 2);
  EXPECT_EQ(moved.rank().job_id(), id) << "it goes on where a worker is";
  bool lost = false;
  for (const v1::Event& event : Events(id)) lost = lost || event.reason().code() == "WORKER_LOST";
  EXPECT_TRUE(lost);
}

TEST_F(JobLifeTest, ARestartedCoordinatorAdoptsWhatRuns) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  Save(id, 1, 2);
  const int64_t seq = workers_[1]->Report(Key(id, 1, 1), Step(3));
  EXPECT_EQ(workers_[1]->WaitForAck(seq), seq);
  const int64_t job_seq = Get(id).seq();
  Down();
  Up();
  for (const auto& worker : workers_) worker->Connect(address_);
  EXPECT_EQ(workers_[1]->welcome_acked(), seq) << "what was acknowledged is known";
  EXPECT_EQ(Get(id).status().state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(Get(id).status().step(), 3);
  EXPECT_GE(Get(id).seq(), job_seq);
  workers_[1]->Report(Key(id, 1, 1), Step(99), seq);  // sent again: dropped
  Finish(id, 1);
  EXPECT_THAT(MetricSteps(id), ElementsAre(3));
  EXPECT_EQ(Road(id), "PREPARING QUEUED STARTING RUNNING EXPORTING SUCCEEDED") << "no attempt was given up";
}

TEST_F(JobLifeTest, ARestartInTheMiddleOfExportingFinishesTheJob) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  workers_[1]->Report(Key(id, 1, 1), Finished(100));
  const int64_t seq = workers_[0]->Report(Key(id, 1, 0), Exported(0));
  workers_[0]->WaitForAck(seq);
  WaitFor(id, v1::JOB_STATE_EXPORTING);
  Down();
  Up();
  for (const auto& worker : workers_) worker->Connect(address_);
  workers_[1]->Report(Key(id, 1, 1), Exported(1));
  WaitFor(id, v1::JOB_STATE_SUCCEEDED);
}

TEST_F(JobLifeTest, CancelFreesTheDevicesWhenTheRanksAreGone) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  const std::string next = Submit(Spec(2), "second");
  EXPECT_THAT(WaitUntil(next, [](const v1::Job& job) { return job.status().queue_position() == 1; }).status().reason().message(),
              HasSubstr("waits for 2 devices, 0 free"));
  for (const auto& worker : workers_) worker->set_stubborn(true);
  grpc::ClientContext context;
  v1::CancelJobRequest request;
  request.set_id(id);
  request.set_request_id("cancel");
  v1::Job job;
  ASSERT_TRUE(jobs_->CancelJob(&context, request, &job).ok());
  EXPECT_EQ(job.status().state(), v1::JOB_STATE_CANCELLING);
  EXPECT_EQ(Get(next).status().state(), v1::JOB_STATE_QUEUED) << "the devices are not free yet";
  for (const auto& worker : workers_) worker->set_stubborn(false);
  WaitFor(id, v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(workers_[0]->WaitForRank(0, 1).rank().job_id(), next);
}

TEST_F(JobLifeTest, AQueuedJobIsCancelledAtOnce) {
  Up();
  Register();
  const std::string id = Submit(Spec(2));
  EXPECT_EQ(WaitUntil(id, [](const v1::Job& job) { return job.status().queue_position() == 1; }).status().reason().code(), "NO_CAPACITY");
  grpc::ClientContext context;
  v1::CancelJobRequest request;
  request.set_id(id);
  v1::Job job;
  ASSERT_TRUE(jobs_->CancelJob(&context, request, &job).ok());
  EXPECT_EQ(job.status().state(), v1::JOB_STATE_CANCELLED);
}

TEST_F(JobLifeTest, BadDataFailsTheJobWithItsRow) {
  work_.set_prepare_error(absl::InvalidArgumentError("train.jsonl: row 3: broken"));
  Begin();
  const std::string id = Submit(Spec(2));
  const v1::Job job = WaitFor(id, v1::JOB_STATE_FAILED);
  EXPECT_EQ(job.status().reason().code(), "DATASET_INVALID");
  EXPECT_THAT(job.status().reason().message(), HasSubstr("row 3"));
}

TEST_F(JobLifeTest, AFullDiskIsWaitedOut) {
  work_.set_prepare_error(absl::ResourceExhaustedError("no room"));
  Begin();
  const std::string id = Submit(Spec(2));
  EXPECT_EQ(WaitUntil(id, [](const v1::Job& job) { return job.status().reason().code() == "DISK_FULL"; }).status().state(), v1::JOB_STATE_PREPARING);
  work_.set_prepare_error(absl::OkStatus());
  WaitFor(id, v1::JOB_STATE_STARTING);
}

TEST_F(JobLifeTest, RestartsEndWhenTheBudgetIsSpent) {
  Begin();
  const std::string id = Submit(Spec(2, "limits: {max_restarts: 1}\n"));
  for (int64_t epoch = 1; epoch <= 2; ++epoch) {
    workers_[0]->WaitForRank(0, epoch);
    workers_[0]->Report(Key(id, epoch, 0), Killed(SIGKILL));
  }
  EXPECT_EQ(WaitFor(id, v1::JOB_STATE_FAILED).status().reason().code(), "WORKER_CRASHED");
}

// The WAL cannot grow: what was promised stays, what could not be written is refused, and the service goes on when there is room.
TEST_F(JobLifeTest, AStoreThatCannotCommitNeitherLosesNorLies) {
  Begin();
  const std::string first = Submit(Spec(2), "first");
  MakeReady(first, 1);
  struct stat wal;
  ASSERT_EQ(stat((dir_ + "/ppft.db-wal").c_str(), &wal), 0);
  signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit tight = before;
  tight.rlim_cur = static_cast<rlim_t>(wal.st_size);
  setrlimit(RLIMIT_FSIZE, &tight);
  v1::Job job;
  const grpc::Status refused = TrySubmit(Spec(2), "second", &job);
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_FALSE(refused.ok());
  for (const auto& worker : workers_) worker->Connect(address_);  // the streams were closed
  const std::string second = Submit(Spec(2), "second");
  EXPECT_NE(second, first);
  EXPECT_EQ(Get(first).status().state(), v1::JOB_STATE_RUNNING);
  Finish(first, 1);
  EXPECT_EQ(workers_[0]->WaitForRank(0, 1).rank().job_id(), second);
}

}  // namespace
}  // namespace ppft::coordinator
