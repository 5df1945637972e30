// Jobs from submit to their end, driven by fake workers over real gRPC and a real store.
#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <atomic>
#include <csignal>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "common/net/status.h"
#include "tests/coordinator/service/fake_worker.h"
#include "tests/coordinator/service/test_service.h"

namespace ppft::coordinator {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

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

v1::TrainerReport Corrupt(int64_t step) {
  v1::TrainerReport report;
  *report.mutable_failure()->mutable_reason() = MakeReason("CHECKPOINT_CORRUPT", "rank-0.safetensors cannot be read");
  report.mutable_failure()->set_step(step);
  report.mutable_failure()->set_peer(-1);
  return report;
}

v1::TrainerReport BrokenLink() {
  v1::TrainerReport report;
  *report.mutable_failure()->mutable_reason() = MakeReason("COMM_ERROR", "rank 1: closed");
  report.mutable_failure()->set_peer(1);
  return report;
}

class JobLifeTest : public ServiceTest {
 protected:
  // Those that are to be lost are silent for so long; those that are not may be held up for almost as long.
  static constexpr absl::Duration kShortLease = absl::Seconds(3);

  void Begin() {
    Up();
    Register();
    for (int i = 0; i < 2; ++i) workers_.push_back(std::make_unique<FakeWorker>(address_, absl::StrCat("worker-", i), "first"));
    for (const auto& worker : workers_) ASSERT_TRUE(worker->WaitForWelcome());
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

  void WaitUntilUnlinked(const std::string& name) {
    std::string state;
    for (int i = 0; i < 12000 && state != "lost"; ++i) {
      absl::SleepFor(absl::Milliseconds(10));
      grpc::ClientContext context;
      v1::ListWorkersResponse response;
      ASSERT_TRUE(cluster_->ListWorkers(&context, {}, &response).ok());
      for (const v1::Worker& worker : response.workers()) {
        if (worker.name() == name) state = worker.state();
      }
    }
    EXPECT_EQ(state, "lost");
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
  workers_[1].reset();
  WaitUntilUnlinked("worker-1");
  workers_[1] = std::make_unique<FakeWorker>(address_, "worker-1", "second");
  EXPECT_TRUE(workers_[1]->WaitForWelcome()) << "the old one's connection has ended: its name is free at once";
  MakeReady(id, 2);
  EXPECT_THAT(Road(id), HasSubstr("RUNNING RECOVERING QUEUED STARTING RUNNING"));
}

TEST_F(JobLifeTest, AStrangerOfTheSameNameIsRefusedAndTheFirstGoesOn) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  FakeWorker stranger(address_, "worker-1", "stranger");
  EXPECT_FALSE(stranger.WaitForWelcome());
  const grpc::Status refused = stranger.WaitForEnd();
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_THAT(refused.error_message(), HasSubstr("\"worker-1\" is in use by a ppft-worker at 127.0.0.1"));
  EXPECT_THAT(refused.error_message(), HasSubstr("--name"));
  EXPECT_EQ(net::GetErrorInfo(net::StatusFromGrpc(refused)).reason, "WORKER_NAME_IN_USE");
  Finish(id, 1);
  EXPECT_EQ(Get(id).status().restarts(), 0);
}

TEST_F(JobLifeTest, TheNameOfASilentWorkerIsFreeWhenItsLeaseEnds) {
  options_.lease = kShortLease;
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  const std::unique_ptr<FakeWorker> silent = std::move(workers_[1]);
  silent->FallSilent();
  do {
    workers_[1] = std::make_unique<FakeWorker>(address_, "worker-1", "second");
  } while (!workers_[1]->WaitForWelcome());
  EXPECT_EQ(net::GetErrorInfo(net::StatusFromGrpc(silent->WaitForEnd())).reason, "WORKER_REPLACED");
  MakeReady(id, 2);
}

TEST_F(JobLifeTest, ASilentWorkerIsLostWhenItsLeaseEnds) {
  options_.lease = kShortLease;
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

TEST_F(JobLifeTest, WhereThereAreGpusAJobWaitsForThemWhileCpusAreFree) {
  options_.lease = kShortLease;
  Up();
  Register();
  FakeWorker cpu(address_, "cpu", "first", 2);
  workers_.push_back(std::make_unique<FakeWorker>(address_, "gpu", "first", 1, "", "cuda"));
  ASSERT_TRUE(cpu.WaitForWelcome() && workers_[0]->WaitForWelcome());
  const std::string first = Submit(Spec(1), "first");
  EXPECT_EQ(workers_[0]->WaitForRank(0, 1).rank().job_id(), first);
  const std::string second = Submit(Spec(1), "second");
  WaitUntil(second, [](const v1::Job& job) { return job.status().state() == v1::JOB_STATE_STARTING || job.status().queue_position() > 0; });
  EXPECT_EQ(Get(second).status().reason().message(), "waits for 1 cuda device, 0 of 1 free; position 1");
  grpc::ClientContext context;
  v1::CancelJobRequest cancel;
  cancel.set_id(second);
  v1::Job cancelled;
  ASSERT_TRUE(jobs_->CancelJob(&context, cancel, &cancelled).ok());
  // The only GPU goes: what ran on it waits until it is back.
  workers_[0].reset();
  const v1::Job waits = WaitUntil(first, [](const v1::Job& job) {
    return job.status().reason().code() == "NO_CAPACITY" || (job.status().restarts() > 0 && job.status().state() == v1::JOB_STATE_STARTING);
  });
  EXPECT_THAT(waits.status().reason().message(), HasSubstr("needs 1 cuda device as before, the cluster has 0; gpu with 1 (since "));
  EXPECT_EQ(waits.status().state(), v1::JOB_STATE_QUEUED);
  workers_[0] = std::make_unique<FakeWorker>(address_, "gpu", "second", 1, "", "cuda");
  EXPECT_EQ(workers_[0]->WaitForRank(0, 2).rank().job_id(), first);
  EXPECT_TRUE(cpu.WaitForNothing());
}

// A cluster with CPU slots whose only GPU worker drops out before the job comes.
class GpuDropsOutTest : public JobLifeTest {
 protected:
  void BeginWithoutGpu() {
    options_.lease = kShortLease;
    options_.wall = [this] { return absl::Now() + absl::Seconds(later_seconds_.load()); };
    Up();
    Register();
    workers_.push_back(std::make_unique<FakeWorker>(address_, "cpu", "first", 2));
    ASSERT_TRUE(workers_[0]->WaitForWelcome());
    workers_.push_back(std::make_unique<FakeWorker>(address_, "gpu", "first", 1, "", "cuda"));
    ASSERT_TRUE(workers_[1]->WaitForWelcome());
    workers_.pop_back();
    WaitUntilUnlinked("gpu");
    id_ = Submit(Spec(1));
    const v1::Job waits = WaitUntilDecided();
    EXPECT_THAT(waits.status().reason().message(), AllOf(HasSubstr("needs 1 cuda device, the cluster has 0; gpu with 1 (since "), HasSubstr("CPU slots")));
    EXPECT_EQ(waits.status().state(), v1::JOB_STATE_QUEUED);
  }
  // Until the worker is lost and the queue has been gone through without it.
  v1::Job WaitUntilDecided() {
    return WaitUntil(id_, [](const v1::Job& job) {
      return job.status().state() == v1::JOB_STATE_STARTING || absl::StrContains(job.status().reason().message(), "the cluster has 0; gpu with 1 (since");
    });
  }
  void ComeBack(const std::string& kind, int devices = 1, const std::string& problem = "") {
    workers_.resize(1);
    workers_.push_back(std::make_unique<FakeWorker>(address_, "gpu", "second", devices, problem, kind));
    ASSERT_TRUE(workers_[1]->WaitForWelcome());
  }
  std::string RunsOn() { return WaitFor(id_, v1::JOB_STATE_STARTING).status().assignment(0).worker(); }

  std::string id_;
  std::atomic<int64_t> later_seconds_ = 0;
};

TEST_F(GpuDropsOutTest, TheJobWaitsForItAlsoOverTheCoordinatorsRestart) {
  BeginWithoutGpu();
  Down();
  Up();
  workers_[0]->Connect(address_);
  ASSERT_TRUE(workers_[0]->WaitForWelcome());
  controller_->Run([](JobStore&) { return absl::OkStatus(); }).IgnoreError();  // a whole batch with the CPU slots
  EXPECT_EQ(WaitUntilDecided().status().state(), v1::JOB_STATE_QUEUED);
  ComeBack("cuda");
  EXPECT_EQ(RunsOn(), "gpu");
}

TEST_F(GpuDropsOutTest, TheStatedTimeEnds) {
  BeginWithoutGpu();
  later_seconds_ = 3601;
  EXPECT_EQ(RunsOn(), "cpu");
}

TEST_F(GpuDropsOutTest, AWorkerThatIsWithoutGpusNowIsNotWaitedFor) {
  BeginWithoutGpu();
  ComeBack("cpu");
  EXPECT_EQ(RunsOn(), "cpu");
}

TEST_F(GpuDropsOutTest, AHostWhoseDriverIsNotThereYetIsWaitedFor) {
  BeginWithoutGpu();
  ComeBack("cuda", 0, "no driver");
  controller_->Run([](JobStore&) { return absl::OkStatus(); }).IgnoreError();
  EXPECT_EQ(Get(id_).status().state(), v1::JOB_STATE_QUEUED);
  workers_.resize(1);
  ComeBack("cuda");
  EXPECT_EQ(RunsOn(), "gpu");
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

// The first move to `state` in the job's events.
v1::Event MoveTo(const std::vector<v1::Event>& events, v1::JobState state) {
  for (const v1::Event& event : events) {
    if (event.to() == state && event.from() != state) return event;
  }
  return v1::Event();
}

TEST_F(JobLifeTest, AStoppedPeerIsNamedByTheRankThatLostIt) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  v1::TrainerReport left;
  left.mutable_exited()->set_status(1);
  workers_[0]->Report(Key(id, 1, 0), BrokenLink());
  workers_[0]->Report(Key(id, 1, 0), left);  // rank 1 says nothing: it stands still
  workers_[1]->WaitForRank(1, 2);
  const v1::Reason reason = MoveTo(Events(id), v1::JOB_STATE_RECOVERING).reason();
  EXPECT_EQ(reason.code(), "COMM_ERROR");
  EXPECT_THAT(reason.message(), HasSubstr("rank 0 on worker-0 lost rank 1 on worker-1"));
}

TEST_F(JobLifeTest, AWorkerThatFailsAJobTwiceIsNotUsedForItAgain) {
  Begin();
  for (const auto& worker : workers_) worker->welcome_acked();
  const std::string id = Submit(Spec(1));
  for (int64_t epoch = 1; epoch <= 2; ++epoch) {
    workers_[0]->WaitForRank(0, epoch);
    workers_[0]->Report(Key(id, epoch, 0), Killed(SIGKILL));
  }
  EXPECT_EQ(workers_[1]->WaitForRank(0, 3).rank().job_id(), id);
  bool said = false;
  for (const v1::Event& event : Events(id))
    said = said || (event.reason().code() == "WORKER_EXCLUDED" && event.reason().message().find("worker-0") != std::string::npos);
  EXPECT_TRUE(said);
  EXPECT_THAT(Get(id).status().reason().message(), HasSubstr("worker-0 failed this job twice and is left out"));
}

TEST_F(JobLifeTest, AnExcludedWorkerIsUsedAgainWhenNoOtherCanTakeTheJob) {
  Begin();
  const std::string id = Submit(Spec(2));
  for (int64_t epoch = 1; epoch <= 2; ++epoch) {
    workers_[1]->WaitForRank(1, epoch);
    workers_[1]->Report(Key(id, epoch, 1), Killed(SIGKILL));
  }
  workers_[1]->WaitForRank(1, 3);
  EXPECT_THAT(Get(id).status().reason().message(), HasSubstr("worker-1 failed this job twice, but the other workers cannot take it"));
}

DiskRoom Full() {
  DiskRoom room;
  room.free_bytes = 1000;
  room.high_bytes = 1 << 20;
  room.full = true;
  return room;
}

DiskRoom Free(int64_t bytes = int64_t{1} << 40) {
  DiskRoom room;
  room.free_bytes = bytes;
  room.high_bytes = 1 << 20;
  return room;
}

bool IsPausedForDisk(const v1::Job& job) { return job.status().state() == v1::JOB_STATE_PAUSED && job.status().reason().code() == "DISK_FULL"; }

TEST_F(JobLifeTest, DataThatDoNotFitPauseTheJobUntilThereIsRoom) {
  work_.set_prepare_error(absl::ResourceExhaustedError("no room for the token file"));
  Begin();
  const std::string id = Submit(Spec(2));
  const v1::Reason reason = WaitUntil(id, IsPausedForDisk).status().reason();
  EXPECT_EQ(reason.owner(), "OPERATOR");
  EXPECT_THAT(reason.message(), HasSubstr("no room for the token file"));
  EXPECT_THAT(reason.message(), HasSubstr("goes on by itself"));
  EXPECT_THAT(reason.remedy(), HasSubstr("--data_dir"));
  work_.set_prepare_error(absl::OkStatus());
  WaitFor(id, v1::JOB_STATE_STARTING);
  EXPECT_THAT(Road(id), testing::StartsWith("PREPARING PAUSED PREPARING"));
}

TEST_F(JobLifeTest, AFullDiskStopsAdmissionAndPausesWhatWaitsButNotWhatRuns) {
  Begin();
  const std::string running = Submit(Spec(2), "first");
  MakeReady(running, 1);
  const std::string waiting = Submit(Spec(2), "second");
  WaitUntil(waiting, [](const v1::Job& job) { return job.status().queue_position() == 1; });
  work_.set_room(Full());
  WaitUntil(waiting, IsPausedForDisk);
  v1::Job job;
  const grpc::Status refused = TrySubmit(Spec(2), "third", &job);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.error_message(), HasSubstr("DISK_FULL"));
  EXPECT_EQ(Submit(Spec(2), "first"), running) << "a repeated request gets its answer";
  EXPECT_EQ(Get(running).status().state(), v1::JOB_STATE_RUNNING);
  Down();
  Up();
  for (const auto& worker : workers_) worker->Connect(address_);
  EXPECT_TRUE(IsPausedForDisk(Get(waiting))) << "it survives a restart";
  work_.set_room(Free());
  WaitUntil(waiting, [](const v1::Job& now) { return now.status().state() == v1::JOB_STATE_QUEUED && now.status().queue_position() == 1; });
  Finish(running, 1);
  EXPECT_EQ(workers_[0]->WaitForRank(0, 1).rank().job_id(), waiting);
}

TEST_F(JobLifeTest, ARunningJobWhoseFilesHaveNoRoomPausesAndGoesOnFromItsCheckpoint) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  Save(id, 1, 2);
  work_.set_room(Free(5 << 20));
  controller_->ReportDiskFull(Key(id, 7, 0), 1, "of another epoch: changes nothing");
  controller_->ReportDiskFull(Key(id, 1, 0), 8 << 20, "no room for the checkpoint of rank 0");
  const v1::Job paused = WaitUntil(id, IsPausedForDisk);
  EXPECT_THAT(paused.status().reason().message(), HasSubstr("no room for the checkpoint of rank 0"));
  EXPECT_THAT(paused.status().reason().message(), HasSubstr("when 8 MiB are free"));
  for (const auto& worker : workers_) EXPECT_TRUE(worker->WaitForNothing()) << "a paused job holds no device";
  Down();
  Up();
  for (const auto& worker : workers_) worker->Connect(address_);
  EXPECT_TRUE(IsPausedForDisk(Get(id))) << "5 MiB are not the 8 that it needs";
  work_.set_room(Free(9 << 20));
  EXPECT_EQ(workers_[0]->WaitForRank(0, 2).resume().state().step(), 2);
  MakeReady(id, 2);
  Finish(id, 2);
  EXPECT_EQ(Get(id).status().restarts(), 0) << "a full disk is nobody's failure";
  EXPECT_EQ(Road(id), "PREPARING QUEUED STARTING RUNNING RECOVERING QUEUED PAUSED QUEUED STARTING RUNNING EXPORTING SUCCEEDED");
}

TEST_F(JobLifeTest, AStoreShortOfRoomPausesWhatRunsToo) {
  Begin();
  const std::string id = Submit(Spec(2));
  MakeReady(id, 1);
  DiskRoom room = Full();
  room.critical = true;
  work_.set_room(room);
  WaitUntil(id, IsPausedForDisk);
  work_.set_room(Free());
  MakeReady(id, 2);
}

TEST_F(JobLifeTest, APausedJobIsCancelledAtOnce) {
  Begin();
  const std::string id = Submit(Spec(3));
  WaitFor(id, v1::JOB_STATE_QUEUED);
  work_.set_room(Full());
  WaitUntil(id, IsPausedForDisk);
  grpc::ClientContext context;
  v1::CancelJobRequest request;
  request.set_id(id);
  v1::Job job;
  ASSERT_TRUE(jobs_->CancelJob(&context, request, &job).ok());
  EXPECT_EQ(job.status().state(), v1::JOB_STATE_CANCELLED);
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

TEST_F(JobLifeTest, ADamagedCheckpointSendsTheJobBackToAnOlderOneAndThenToTheBeginning) {
  Begin();
  v1::JobSpec spec = Spec(2, "limits: {max_restarts: 1}\n");
  spec.mutable_checkpoint()->set_save_total_limit(3);
  const std::string id = Submit(spec);
  MakeReady(id, 1);
  for (int step = 1; step <= 5; ++step) workers_[1]->Report(Key(id, 1, 1), Step(step));
  Save(id, 1, 2);
  Save(id, 1, 4);
  workers_[0]->Report(Key(id, 1, 0), Killed(SIGKILL));
  EXPECT_EQ(workers_[0]->WaitForRank(0, 2).resume().state().step(), 4);
  work_.set_damaged({"checkpoint-4-0"});
  workers_[0]->Report(Key(id, 2, 0), Corrupt(4));
  workers_[1]->Report(Key(id, 2, 1), Corrupt(0));  // both need the file; a trainer names no step
  EXPECT_EQ(workers_[0]->WaitForRank(0, 3).resume().state().step(), 2);
  EXPECT_THAT(MetricSteps(id), ElementsAre(1, 2));
  EXPECT_EQ(Get(id).status().checkpoint_step(), 2);

  // What is damaged stays so when the coordinator starts again.
  Down();
  Up();
  for (const auto& worker : workers_) worker->Connect(address_);
  auto checkpoints = controller_->Run([&](JobStore& store) { return store.ListCheckpoints(id); });
  ASSERT_EQ(checkpoints->size(), 2u);
  EXPECT_EQ((*checkpoints)[0].damage(), "");
  EXPECT_EQ((*checkpoints)[1].damage(), "checkpoint-4-0 is damaged");
  work_.set_damaged({"checkpoint-2-1"});
  workers_[0]->Report(Key(id, 3, 0), Corrupt(2));
  EXPECT_FALSE(workers_[0]->WaitForRank(0, 4).has_resume());
  EXPECT_THAT(MetricSteps(id), IsEmpty());
  EXPECT_EQ(Get(id).status().step(), 0);

  // The same steps are saved again; the job ends although its one restart is spent.
  MakeReady(id, 4);
  Save(id, 4, 2);
  Save(id, 4, 4);
  checkpoints = controller_->Run([&](JobStore& store) { return store.ListCheckpoints(id); });
  for (const v1::CheckpointManifest& one : *checkpoints) EXPECT_EQ(one.damage(), "") << one.state().step();
  Finish(id, 4);
  std::vector<std::string> notes;
  for (const v1::Event& event : Events(id)) {
    if (event.from() == event.to() && event.reason().code() == "CHECKPOINT_CORRUPT")
      notes.push_back(absl::StrCat(event.step(), ": ", event.reason().message()));
  }
  EXPECT_THAT(notes, ElementsAre(AllOf(HasSubstr("4: "), HasSubstr("goes back to the one of step 2"), HasSubstr("checkpoint-4-0 is damaged")),
                                 AllOf(HasSubstr("2: "), HasSubstr("starts again from the beginning"))));
}

// A trainer's word alone costs no checkpoint, nor does a disk that is not there: such attempts count.
TEST_F(JobLifeTest, ACheckpointWhoseFilesAreIntactStays) {
  for (const bool mounted : {true, false}) {
    Begin();
    const std::string id = Submit(Spec(2, "limits: {max_restarts: 2}\n"));
    MakeReady(id, 1);
    Save(id, 1, 2);
    workers_[0]->Report(Key(id, 1, 0), Killed(SIGKILL));
    if (!mounted) work_.set_store_error(absl::UnavailableError("blobs/ab is not there"));
    for (int64_t epoch = 2; epoch <= 3; ++epoch) {
      EXPECT_EQ(workers_[1]->WaitForRank(1, epoch).resume().state().step(), 2);
      workers_[1]->Report(Key(id, epoch, 1), Corrupt(2));
    }
    const v1::Job job = WaitFor(id, v1::JOB_STATE_FAILED);
    EXPECT_EQ(job.status().reason().code(), "CHECKPOINT_CORRUPT") << mounted;
    EXPECT_EQ(job.status().checkpoint_step(), 2) << mounted;
    const auto checkpoints = controller_->Run([&](JobStore& store) { return store.ListCheckpoints(id); });
    ASSERT_EQ(checkpoints->size(), 1u);
    EXPECT_EQ((*checkpoints)[0].damage(), "") << mounted;
    workers_.clear();
    Down();
    ASSERT_TRUE(RemoveAll(dir_).ok());
    ASSERT_TRUE(MakeDirs(dir_).ok());
  }
}

// After its start a job has read what it goes on from: nothing that happens then says anything about a checkpoint.
TEST_F(JobLifeTest, AVerificationThatFailsEndsTheJobAndCostsNoCheckpoint) {
  Begin();
  const std::string id = Submit(Spec(2));
  work_.set_damaged({"checkpoint-2-0", "checkpoint-4-0"});  // were anybody to look
  MakeReady(id, 1);
  Save(id, 1, 2);
  workers_[0]->Report(Key(id, 1, 0), Killed(SIGKILL));
  v1::TrainerReport mismatch;
  *mismatch.mutable_failure()->mutable_reason() = MakeReason("EXPORT_MISMATCH", "the merged read back from disk gives logits that differ by inf");
  mismatch.mutable_failure()->set_peer(-1);
  for (int64_t epoch = 2; epoch <= 3; ++epoch) {
    EXPECT_EQ(workers_[0]->WaitForRank(0, epoch).resume().state().step(), epoch == 2 ? 2 : 4);
    MakeReady(id, epoch);
    if (epoch == 2) Save(id, epoch, 4);
    workers_[1]->Report(Key(id, epoch, 1), Finished(100));
    mismatch.mutable_failure()->set_step(100);
    workers_[0]->Report(Key(id, epoch, 0), mismatch);
  }
  const v1::Job job = WaitFor(id, v1::JOB_STATE_FAILED);
  EXPECT_EQ(job.status().reason().code(), "EXPORT_MISMATCH");
  EXPECT_EQ(job.status().restarts(), 2) << "one for the kill, one for the mismatch";
  EXPECT_EQ(job.status().checkpoint_step(), 4);
}

TEST_F(JobLifeTest, ARunningRankCannotCostACheckpoint) {
  Begin();
  const std::string id = Submit(Spec(2, "limits: {max_restarts: 1}\n"));
  work_.set_damaged({"checkpoint-2-0"});
  MakeReady(id, 1);
  Save(id, 1, 2);
  workers_[0]->Report(Key(id, 1, 0), Killed(SIGKILL));
  MakeReady(id, 2);
  workers_[0]->Report(Key(id, 2, 0), Corrupt(2));
  const v1::Job job = WaitFor(id, v1::JOB_STATE_FAILED);
  EXPECT_EQ(job.status().restarts(), 1);
  EXPECT_EQ(job.status().checkpoint_step(), 2);
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
