#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "coordinator/store/migrations.h"
#include "coordinator/store/sqlite.h"
#include "coordinator/store/sqlite_job_store.h"

namespace ppft::coordinator {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class StoreTest : public testing::Test {
 protected:
  StoreTest() {
    char path[] = "/tmp/ppft-store-XXXXXX";
    dir_ = mkdtemp(path);
    Open();
  }
  ~StoreTest() override {
    store_.reset();
    RemoveAll(dir_).IgnoreError();
  }
  void Open() {
    store_.reset();
    auto store = OpenSqliteJobStore(dir_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  // In one transaction.
  absl::Status Write(const std::function<absl::Status()>& body) {
    if (absl::Status status = store_->Begin(); !status.ok()) return status;
    absl::Status status = body();
    if (status.ok()) return store_->Commit();
    store_->Rollback();
    return status;
  }
  static v1::JobRecord Record(const std::string& id, int64_t order = 1) {
    v1::JobRecord record;
    record.mutable_job()->set_id(id);
    record.mutable_job()->set_name("name-" + id);
    record.mutable_job()->set_request_id("request-" + id);
    record.mutable_job()->mutable_spec()->set_priority(50);
    record.mutable_job()->mutable_spec()->mutable_model()->set_base_model("m");
    record.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_PREPARING);
    record.mutable_job()->mutable_status()->set_attempt_epoch(1);
    record.set_submit_order(order);
    return record;
  }
  void Insert(const v1::JobRecord& record) {
    const absl::Status status = Write([&] { return store_->InsertJob(record); });
    ASSERT_TRUE(status.ok()) << status;
  }

  std::string dir_;
  std::unique_ptr<JobStore> store_;
};

TEST_F(StoreTest, AJobComesBackWholeAfterReopening) {
  v1::JobRecord record = Record("job-a");
  record.mutable_plan()->set_schedule("1f1b");
  record.mutable_prepared()->mutable_train_tokens()->set_sha256("t");
  record.mutable_prepared()->mutable_train()->add_lengths(7);
  Insert(record);
  Insert(Record("job-b", 2));
  Open();
  const auto jobs = store_->LoadJobs();
  ASSERT_TRUE(jobs.ok()) << jobs.status();
  ASSERT_EQ(jobs->size(), 2u);
  EXPECT_EQ((*jobs)[0].SerializeAsString(), record.SerializeAsString());
  EXPECT_EQ((*jobs)[1].job().id(), "job-b");
}

TEST_F(StoreTest, AnOldEpochChangesNothing) {
  v1::JobRecord record = Record("job-a");
  Insert(record);
  record.mutable_job()->mutable_status()->set_attempt_epoch(2);
  ASSERT_TRUE(Write([&] { return store_->UpdateJob(record, 1); }).ok());
  v1::JobRecord zombie = record;
  zombie.mutable_job()->mutable_status()->set_step(99);
  const absl::Status status = Write([&] { return store_->UpdateJobStatus(zombie.job(), 1); });
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("STALE_EPOCH"));
  EXPECT_EQ((*store_->LoadJobs())[0].job().status().step(), 0);
}

TEST_F(StoreTest, TheDatabaseItselfRefusesToLeaveATerminalStateOrToLowerAnEpoch) {
  v1::JobRecord record = Record("job-a");
  record.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_FAILED);
  record.mutable_job()->mutable_status()->set_attempt_epoch(5);
  Insert(record);
  v1::JobRecord back = record;
  back.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Write([&] { return store_->UpdateJob(back, 5); }).code(), absl::StatusCode::kFailedPrecondition);
  back = record;
  back.mutable_job()->mutable_status()->set_attempt_epoch(4);
  EXPECT_EQ(Write([&] { return store_->UpdateJob(back, 5); }).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(StoreTest, OneRequestIdMakesOneJob) {
  Insert(Record("job-a"));
  v1::JobRecord twin = Record("job-b", 2);
  twin.mutable_job()->set_request_id("request-job-a");
  EXPECT_EQ(Write([&] { return store_->InsertJob(twin); }).code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(StoreTest, ARepeatedRequestIsFoundAndAnotherPayloadIsRefused) {
  EXPECT_FALSE((*store_->FindRequest("SubmitJob", "r", "hash-1")).has_value());
  ASSERT_TRUE(Write([&] { return store_->PutRequest("SubmitJob", "r", "hash-1", "job-a"); }).ok());
  EXPECT_EQ(**store_->FindRequest("SubmitJob", "r", "hash-1"), "job-a");
  EXPECT_EQ(store_->FindRequest("SubmitJob", "r", "hash-2").status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_FALSE((*store_->FindRequest("CancelJob", "r", "hash-2")).has_value()) << "ids are per method";
}

TEST_F(StoreTest, ARolledBackSavepointTakesOnlyItsOwnWritesAway) {
  ASSERT_TRUE(store_->Begin().ok());
  ASSERT_TRUE(store_->InsertJob(Record("job-a")).ok());
  ASSERT_TRUE(store_->Savepoint().ok());
  ASSERT_TRUE(store_->InsertJob(Record("job-b", 2)).ok());
  ASSERT_TRUE(store_->RollbackTo().ok());
  ASSERT_TRUE(store_->Savepoint().ok());
  ASSERT_TRUE(store_->InsertJob(Record("job-c", 3)).ok());
  ASSERT_TRUE(store_->Release().ok());
  ASSERT_TRUE(store_->Commit().ok());
  std::vector<std::string> ids;
  const auto jobs = store_->LoadJobs();
  for (const v1::JobRecord& record : *jobs) ids.push_back(record.job().id());
  EXPECT_THAT(ids, ElementsAre("job-a", "job-c"));
}

TEST_F(StoreTest, EventsAreNumberedOverAllJobsAndReadFromACursor) {
  Insert(Record("job-a"));
  Insert(Record("job-b", 2));
  std::vector<int64_t> seqs;
  ASSERT_TRUE(Write([&]() -> absl::Status {
                for (const char* id : {"job-a", "job-b", "job-a"}) {
                  v1::Event event;
                  event.set_job_id(id);
                  seqs.push_back(*store_->AppendEvent(event));
                }
                return absl::OkStatus();
              }).ok());
  EXPECT_LT(seqs[0], seqs[1]);
  const auto events = store_->ListEvents("job-a", seqs[0], 10);
  ASSERT_EQ(events->size(), 1u);
  EXPECT_EQ(events->front().seq(), seqs[2]);
}

TEST_F(StoreTest, MetricRowsAreReplacedSortedAndCut) {
  Insert(Record("job-a"));
  const auto put = [&](int64_t step, bool eval, double loss) {
    v1::MetricRow row;
    row.set_step(step);
    eval ? row.set_eval_loss(loss) : row.set_loss(loss);
    ASSERT_TRUE(Write([&] { return store_->PutMetric("job-a", row); }).ok());
  };
  put(2, true, 9);
  put(2, false, 1);
  put(1, false, 2);
  put(2, false, 3);
  put(0, true, 8);
  const auto rows = store_->ListMetrics("job-a", -1, 100);
  std::vector<std::pair<int64_t, double>> shown;
  for (const v1::MetricRow& row : *rows) shown.emplace_back(row.step(), row.has_eval_loss() ? row.eval_loss() : row.loss());
  EXPECT_THAT(shown, ElementsAre(std::make_pair(0, 8.0), std::make_pair(1, 2.0), std::make_pair(2, 3.0), std::make_pair(2, 9.0)));
  EXPECT_EQ((*store_->NewestMetric("job-a", true))->eval_loss(), 9);
  ASSERT_TRUE(Write([&] { return store_->DeleteMetricsAfter("job-a", 1); }).ok());
  EXPECT_EQ(store_->ListMetrics("job-a", -1, 100)->size(), 2u);
  ASSERT_TRUE(Write([&] { return store_->DeleteMetricsAfter("job-a", -1); }).ok());
  EXPECT_THAT(*store_->ListMetrics("job-a", -1, 100), IsEmpty()) << "the evaluation before step 1 goes too";
  EXPECT_FALSE((*store_->NewestMetric("job-a", false)).has_value());
}

TEST_F(StoreTest, ContentsAreReferencedAsLongAsSomethingNamesThem) {
  Insert(Record("job-a"));
  v1::CheckpointManifest checkpoint;
  checkpoint.set_job_id("job-a");
  checkpoint.mutable_state()->set_step(10);
  checkpoint.add_files()->set_sha256("c");
  v1::TrainerReport written;
  written.mutable_checkpoint()->add_files()->mutable_content()->set_sha256("c");
  v1::RankKey rank;
  rank.set_job_id("job-a");
  rank.set_epoch(1);
  ASSERT_TRUE(Write([&]() -> absl::Status {
                EXPECT_TRUE(store_->PutRankReport(rank, v1::TrainerReport::kCheckpoint, 20, written).ok());
                return store_->PutCheckpoint(checkpoint);
              }).ok());
  EXPECT_TRUE(*store_->IsReferenced("c"));
  ASSERT_TRUE(Write([&] { return store_->DeleteCheckpoint("job-a", 10); }).ok());
  EXPECT_TRUE(*store_->IsReferenced("c")) << "a waiting report names it";
  ASSERT_TRUE(Write([&] { return store_->DeleteRankReports("job-a", v1::TrainerReport::kCheckpoint, 20); }).ok());
  EXPECT_FALSE(*store_->IsReferenced("c"));
  EXPECT_THAT(*store_->ListCheckpoints("job-a"), IsEmpty());
}

TEST_F(StoreTest, ABlobThatNothingRefersToIsUnused) {
  v1::Dataset dataset;
  dataset.set_id("ds-1");
  dataset.set_sha256("used");
  const absl::Time then = absl::FromUnixSeconds(1000);
  ASSERT_TRUE(Write([&]() -> absl::Status {
                for (const char* sha256 : {"used", "unused"}) EXPECT_TRUE(store_->PutBlob({sha256, 1, then}).ok());
                return store_->PutDataset(dataset);
              }).ok());
  EXPECT_THAT(*store_->ListUnusedBlobs(then), IsEmpty()) << "none is older";
  EXPECT_THAT(*store_->ListUnusedBlobs(then + absl::Seconds(1)), testing::ElementsAre("unused"));
}

TEST_F(StoreTest, WaitingReportsAreSortedByStepAndRankAndGoWithTheAttempt) {
  Insert(Record("job-a"));
  v1::RankKey rank;
  rank.set_job_id("job-a");
  rank.set_epoch(1);
  ASSERT_TRUE(Write([&]() -> absl::Status {
                for (const auto& [step, number] : {std::pair{20, 0}, {10, 1}, {10, 0}}) {
                  rank.set_rank(number);
                  EXPECT_TRUE(store_->PutRankReport(rank, v1::TrainerReport::kCheckpoint, step, {}).ok());
                }
                return absl::OkStatus();
              }).ok());
  std::vector<std::pair<int64_t, int32_t>> rows;
  const auto listed = store_->ListRankReports("job-a", 1, v1::TrainerReport::kCheckpoint);
  for (const RankReportRow& row : *listed) rows.emplace_back(row.step, row.rank);
  EXPECT_THAT(rows, ElementsAre(std::make_pair(10, 0), std::make_pair(10, 1), std::make_pair(20, 0)));
  EXPECT_THAT(*store_->ListRankReports("job-a", 2, v1::TrainerReport::kCheckpoint), IsEmpty()) << "another epoch's";
  ASSERT_TRUE(Write([&] { return store_->DeleteRankReports("job-a"); }).ok());
  EXPECT_THAT(*store_->ListRankReports("job-a", 1, v1::TrainerReport::kCheckpoint), IsEmpty());
}

TEST_F(StoreTest, DatasetsModelsAndArtifacts) {
  v1::Dataset dataset;
  dataset.set_id("ds-1");
  dataset.set_name("train.jsonl");
  dataset.set_sha256("d");
  v1::ModelRecord model;
  model.mutable_model()->set_name("tiny");
  model.set_config("{}");
  v1::ArtifactManifest artifact;
  artifact.set_id("job-a");
  artifact.set_job_id("job-a");
  artifact.set_type("adapter");
  ASSERT_TRUE(Write([&]() -> absl::Status {
                EXPECT_TRUE(store_->PutDataset(dataset).ok());
                EXPECT_TRUE(store_->PutDataset(dataset).ok()) << "the same content again";
                EXPECT_TRUE(store_->InsertModel(model).ok());
                EXPECT_EQ(store_->InsertModel(model).code(), absl::StatusCode::kAlreadyExists);
                return store_->PutArtifact(artifact);
              }).ok());
  EXPECT_EQ(store_->GetDataset("ds-1")->name(), "train.jsonl");
  EXPECT_EQ(store_->GetDataset("ds-2").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(store_->FindDatasetsByName("train.jsonl")->size(), 1u);
  EXPECT_EQ(store_->GetModel("tiny")->config(), "{}");
  EXPECT_EQ(store_->ListModels(Page{10, "tiny"})->size(), 0u) << "after the last one";
  EXPECT_EQ(store_->GetArtifact("job-a", "merged").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(store_->ListArtifacts("job-a")->size(), 1u);
}

TEST_F(StoreTest, WorkersComeBackWithTheirGpus) {
  ASSERT_TRUE(Write([&]() -> absl::Status {
                EXPECT_TRUE(store_->PutWorker(WorkerRow{"a", "first", 7, 2, 1795435200000}).ok());
                EXPECT_TRUE(store_->PutWorker(WorkerRow{"b", "first", 8, 1, 5}).ok());
                return store_->PutWorker(WorkerRow{"b", "second", 0, 0, 0});
              }).ok());
  Open();
  const std::vector<WorkerRow> workers = *store_->LoadWorkers();
  ASSERT_EQ(workers.size(), 2u);
  EXPECT_EQ(workers[0].incarnation, "first");
  EXPECT_EQ(workers[0].acked_seq, 7);
  EXPECT_EQ(workers[0].num_gpus, 2);
  EXPECT_EQ(workers[0].gpus_away_unix_ms, 1795435200000);
  EXPECT_EQ(workers[1].incarnation, "second");
  EXPECT_EQ(workers[1].num_gpus, 0);
  EXPECT_EQ(workers[1].gpus_away_unix_ms, 0);
}

TEST(Migrate, AWorkerOfTheFirstFormatIsKept) {
  char path[] = "/tmp/ppft-migrate-XXXXXX";
  const std::string dir = mkdtemp(path);
  {
    auto db = Database::Open(dir + "/ppft.db", dir);
    ASSERT_TRUE(db.ok()) << db.status();
    ASSERT_TRUE(Migrate(**db, {Migrations()[0]}).ok());
    ASSERT_TRUE((*db)->Execute("INSERT INTO workers VALUES ('a', 'first', 7)").ok());
  }
  auto store = OpenSqliteJobStore(dir);
  ASSERT_TRUE(store.ok()) << store.status();
  const std::vector<WorkerRow> workers = *(*store)->LoadWorkers();
  ASSERT_EQ(workers.size(), 1u);
  EXPECT_EQ(workers[0].acked_seq, 7);
  EXPECT_EQ(workers[0].num_gpus, 0);
  RemoveAll(dir).IgnoreError();
}

TEST_F(StoreTest, StartNumbersGrowOverRestarts) {
  const int64_t first = *store_->NextStart();
  Open();
  EXPECT_GT(*store_->NextStart(), first);
}

TEST_F(StoreTest, TheFileIsForItsOwnerAlone) {
  struct stat info;
  ASSERT_EQ(stat((dir_ + "/ppft.db").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(StoreTest, ASecondProcessIsRefusedAndToldWhichFolder) {
  const pid_t child = fork();
  if (child == 0) {
    const auto second = OpenSqliteJobStore(dir_);
    const std::string message(second.status().message());
    _exit(second.status().code() == absl::StatusCode::kFailedPrecondition && absl::StrContains(message, dir_) && absl::StrContains(message, "in use") ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_F(StoreTest, AFolderThatCannotBeWrittenIsNamed) {
  ASSERT_TRUE(WriteFileAtomic(dir_ + "/file", "x").ok());
  const auto store = OpenSqliteJobStore(dir_ + "/file/below");
  ASSERT_FALSE(store.ok());
  EXPECT_THAT(std::string(store.status().message()), HasSubstr(dir_ + "/file/below"));
}

TEST_F(StoreTest, ADamagedFileIsAnErrorAndNotAnEmptyStore) {
  store_.reset();
  ASSERT_TRUE(RemoveAll(dir_ + "/ppft.db-wal").ok());
  ASSERT_TRUE(WriteFileAtomic(dir_ + "/ppft.db", std::string(8192, 'x')).ok());
  EXPECT_EQ(OpenSqliteJobStore(dir_).status().code(), absl::StatusCode::kDataLoss);
}

TEST(Migrate, RunsWhatIsMissingAndKeepsRows) {
  char path[] = "/tmp/ppft-migrate-XXXXXX";
  const std::string dir = mkdtemp(path);
  std::vector<std::string> migrations = {"CREATE TABLE t (a INTEGER) STRICT; INSERT INTO t VALUES (7);"};
  {
    auto db = Database::Open(dir + "/x.db", dir);
    ASSERT_TRUE(db.ok()) << db.status();
    ASSERT_TRUE(Migrate(**db, migrations).ok());
  }
  auto db = Database::Open(dir + "/x.db", dir);
  migrations.push_back("ALTER TABLE t ADD COLUMN b INTEGER;");
  migrations.push_back("INSERT INTO t (a, b) VALUES (8, 9); INSERT INTO nowhere VALUES (1);");
  const absl::Status broken = Migrate(**db, migrations);
  EXPECT_THAT(std::string(broken.message()), HasSubstr("format 3"));
  {
    Query count = (*db)->Prepare("SELECT count(*), sum(a), sum(b) FROM t");
    ASSERT_TRUE(*count.Step());
    EXPECT_EQ(count.Int(0), 1) << "a migration that fails leaves nothing behind";
    EXPECT_EQ(count.Int(1), 7);
  }
  {
    Query version = (*db)->Prepare("PRAGMA user_version");
    ASSERT_TRUE(*version.Step());
    EXPECT_EQ(version.Int(0), 2);
  }
  migrations.resize(1);
  EXPECT_EQ(Migrate(**db, migrations).code(), absl::StatusCode::kFailedPrecondition) << "an older program on a newer file";
  RemoveAll(dir).IgnoreError();
}

}  // namespace
}  // namespace ppft::coordinator
