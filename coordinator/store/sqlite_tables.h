// The tables behind JobStore as one class over one connection: jobs and their history in sqlite_job_store.cc, contents and what names them in
// sqlite_contents.cc.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "coordinator/store/job_store.h"
#include "coordinator/store/sqlite.h"

namespace ppft::coordinator {

template <typename Message>
Bytes Serialize(const Message& message) {
  return Bytes{message.SerializeAsString()};
}

template <typename Message>
absl::StatusOr<Message> Parse(const std::string& bytes, absl::string_view what) {
  Message message;
  if (!message.ParseFromString(bytes)) return absl::DataLossError(absl::StrCat("store: a damaged row in ", what));
  return message;
}

// One parsed message per row of `query`, from `column`.
template <typename Message>
absl::StatusOr<std::vector<Message>> Collect(Query& query, int column, absl::string_view what) {
  std::vector<Message> rows;
  while (true) {
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
    if (!row) return rows;
    PPFT_ASSIGN_OR_RETURN(Message message, Parse<Message>(query.Text(column), what));
    rows.push_back(std::move(message));
  }
}

// The same for rows of (seq, message): the message gets its seq.
template <typename Message>
absl::StatusOr<std::vector<Message>> CollectWithSeq(Query& query, absl::string_view what) {
  std::vector<Message> rows;
  while (true) {
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
    if (!row) return rows;
    PPFT_ASSIGN_OR_RETURN(Message message, Parse<Message>(query.Text(1), what));
    message.set_seq(query.Int(0));
    rows.push_back(std::move(message));
  }
}

class SqliteJobStore : public JobStore {
 public:
  explicit SqliteJobStore(std::unique_ptr<Database> db) : db_(std::move(db)) {}

  absl::Status Begin() override { return db_->Execute("BEGIN IMMEDIATE"); }
  absl::Status Commit() override { return db_->Execute("COMMIT"); }
  void Rollback() override { db_->Execute("ROLLBACK").IgnoreError(); }  // fails only if SQLite rolled back by itself
  absl::Status Savepoint() override { return db_->Prepare("SAVEPOINT s").Run(); }
  absl::Status Release() override { return db_->Prepare("RELEASE s").Run(); }
  absl::Status RollbackTo() override;
  absl::StatusOr<int64_t> NextStart() override;
  absl::Status InsertJob(const v1::JobRecord& record) override;
  absl::Status UpdateJob(const v1::JobRecord& record, int64_t epoch) override;
  absl::Status UpdateJobStatus(const v1::Job& job, int64_t epoch) override;
  absl::StatusOr<std::vector<v1::JobRecord>> LoadJobs() override;
  absl::StatusOr<std::optional<std::string>> FindRequest(const std::string& method, const std::string& request_id, const std::string& payload_sha256) override;
  absl::Status PutRequest(const std::string& method, const std::string& request_id, const std::string& payload_sha256, const std::string& resource_id) override;
  absl::StatusOr<int64_t> AppendEvent(const v1::Event& event) override;
  absl::StatusOr<std::vector<v1::Event>> ListEvents(const std::string& job_id, int64_t after_seq, int limit) override;
  absl::StatusOr<int64_t> AppendLog(const std::string& job_id, const v1::LogLine& line) override;
  absl::StatusOr<std::vector<v1::LogLine>> ListLogs(const std::string& job_id, int64_t after_seq, int limit) override;
  absl::Status PutMetric(const std::string& job_id, const v1::MetricRow& row) override;
  absl::StatusOr<std::vector<v1::MetricRow>> ListMetrics(const std::string& job_id, int64_t after_step, int limit) override;
  absl::StatusOr<std::optional<v1::MetricRow>> NewestMetric(const std::string& job_id, bool evaluation) override;
  absl::Status DeleteMetricsAfter(const std::string& job_id, int64_t step) override;
  absl::Status PutCheckpoint(const v1::CheckpointManifest& manifest) override;
  absl::Status DeleteCheckpoint(const std::string& job_id, int64_t step) override;
  absl::StatusOr<std::vector<v1::CheckpointManifest>> ListCheckpoints(const std::string& job_id) override;
  absl::Status PutRankReport(const v1::RankKey& rank, int kind, int64_t step, const v1::TrainerReport& report) override;
  absl::StatusOr<std::vector<RankReportRow>> ListRankReports(const std::string& job_id, int64_t epoch, int kind) override;
  absl::Status DeleteRankReports(const std::string& job_id, int kind, int64_t up_to_step) override;
  absl::Status DeleteRankReports(const std::string& job_id) override;
  absl::Status PutWorker(const WorkerRow& worker) override;
  absl::StatusOr<std::vector<WorkerRow>> LoadWorkers() override;
  absl::Status PutBlob(const BlobRow& blob) override;
  absl::StatusOr<std::optional<BlobRow>> GetBlob(const std::string& sha256) override;
  absl::Status DeleteBlob(const std::string& sha256) override;
  absl::StatusOr<bool> IsReferenced(const std::string& sha256) override;
  absl::Status PutDataset(const v1::Dataset& dataset) override;
  absl::StatusOr<v1::Dataset> GetDataset(const std::string& id) override;
  absl::StatusOr<std::vector<v1::Dataset>> FindDatasetsByName(const std::string& name) override;
  absl::StatusOr<std::vector<v1::Dataset>> ListDatasets(const Page& page) override;
  absl::Status InsertModel(const v1::ModelRecord& model) override;
  absl::StatusOr<v1::ModelRecord> GetModel(const std::string& name) override;
  absl::StatusOr<std::vector<v1::Model>> ListModels(const Page& page) override;
  absl::Status PutArtifact(const v1::ArtifactManifest& manifest) override;
  absl::StatusOr<v1::ArtifactManifest> GetArtifact(const std::string& id, const std::string& type) override;
  absl::StatusOr<std::vector<v1::ArtifactManifest>> ListArtifacts(const std::string& job_id) override;
  absl::StatusOr<std::vector<std::string>> ListUnusedBlobs(absl::Time before) override;

 private:
  absl::Status CheckOneChanged(const std::string& job_id, int64_t epoch);

  // content_refs: `owner` names the content.
  absl::Status AddRef(const std::string& owner, const std::string& sha256);
  absl::Status DropRefs(const std::string& owner);
  absl::Status DropRefsBelow(std::string prefix);  // of all owners that begin with it; it ends with '/'
  template <typename Files>
  absl::Status SetRefs(const std::string& owner, const Files& files) {
    PPFT_RETURN_IF_ERROR(DropRefs(owner));
    for (const v1::FileRef& file : files) PPFT_RETURN_IF_ERROR(AddRef(owner, file.sha256()));
    return absl::OkStatus();
  }
  // With the name that was perhaps meant: `names_sql`, a constant, gives two names a row.
  absl::Status NotFound(absl::string_view kind, const std::string& word, const char* names_sql, absl::string_view command);
  absl::Status SetPreparedRefs(const v1::JobRecord& record);

  const std::unique_ptr<Database> db_;
};

}  // namespace ppft::coordinator
