// JobStore: everything that the coordinator must not forget. One object, used by the controller's thread alone.
//
// Writes happen between Begin() and Commit(); what was acknowledged to anybody was committed before. Reads see the writes of the open
// transaction. NOT_FOUND, ALREADY_EXISTS and FAILED_PRECONDITION (a stale epoch) are answers; any other error means that the store is
// broken or the disk full (RESOURCE_EXHAUSTED), and the transaction must be rolled back.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "ppft/v1/artifact.pb.h"
#include "ppft/v1/checkpoint.pb.h"
#include "ppft/v1/dataset.pb.h"
#include "ppft/v1/job.pb.h"
#include "ppft/v1/stored.pb.h"
#include "ppft/v1/worker.pb.h"

namespace ppft::coordinator {

// A worker as it was last seen: enough to know a returning agent and what it still owes.
struct WorkerRow {
  std::string name;
  std::string incarnation;
  int64_t acked_seq = 0;          // reports of this incarnation that are committed
  int32_t num_gpus = 0;           // that it offered last; 0 once nobody waits for them any more
  int64_t gpus_away_unix_ms = 0;  // since when it does not offer them; 0 = it does, as far as is known
};

// A content-addressed file that lies complete and synced on disk.
struct BlobRow {
  std::string sha256;
  int64_t size_bytes = 0;
  absl::Time create_time;
};

// A message of a rank that waits for those of its peers (Listening, CheckpointWritten, …).
struct RankReportRow {
  int32_t rank = 0;
  int64_t step = 0;
  v1::TrainerReport report;
};

// A page of a listing: at most `limit` rows after the row named by `after` ("" = from the start).
struct Page {
  int limit = 100;
  std::string after;
};

class JobStore {
 public:
  virtual ~JobStore() = default;

  // Transactions. Savepoints nest inside one: RollbackTo undoes what came after its Savepoint and keeps the rest.
  virtual absl::Status Begin() = 0;
  virtual absl::Status Commit() = 0;
  virtual void Rollback() = 0;
  virtual absl::Status Savepoint() = 0;
  virtual absl::Status Release() = 0;     // of the newest savepoint
  virtual absl::Status RollbackTo() = 0;  // the newest savepoint, and ends it

  // A number that is larger than all it gave before, over restarts: the coordinator's start number.
  virtual absl::StatusOr<int64_t> NextStart() = 0;

  // Jobs. record.job.id, .request_id and the epoch in .status identify it; UpdateJob and UpdateJobStatus change the row only if its stored
  // epoch is `epoch` (FAILED_PRECONDITION "STALE_EPOCH…" otherwise). UpdateJobStatus writes status, times and seq alone.
  virtual absl::Status InsertJob(const v1::JobRecord& record) = 0;
  virtual absl::Status UpdateJob(const v1::JobRecord& record, int64_t epoch) = 0;
  virtual absl::Status UpdateJobStatus(const v1::Job& job, int64_t epoch) = 0;
  virtual absl::StatusOr<std::vector<v1::JobRecord>> LoadJobs() = 0;  // by submit_order

  // Idempotency. FindRequest: the id of what the first call made; nullopt for a new request_id; ALREADY_EXISTS if the same (method,
  // request_id) came with another payload. payload_sha256 is of the request's canonical bytes without request_id.
  virtual absl::StatusOr<std::optional<std::string>> FindRequest(const std::string& method, const std::string& request_id,
                                                                 const std::string& payload_sha256) = 0;
  virtual absl::Status PutRequest(const std::string& method, const std::string& request_id, const std::string& payload_sha256,
                                  const std::string& resource_id) = 0;

  // Events and logs: append-only, seq over all jobs, given by the store.
  virtual absl::StatusOr<int64_t> AppendEvent(const v1::Event& event) = 0;
  virtual absl::StatusOr<std::vector<v1::Event>> ListEvents(const std::string& job_id, int64_t after_seq, int limit) = 0;
  virtual absl::StatusOr<int64_t> AppendLog(const std::string& job_id, const v1::LogLine& line) = 0;
  virtual absl::StatusOr<std::vector<v1::LogLine>> ListLogs(const std::string& job_id, int64_t after_seq, int limit) = 0;

  // Metric rows: one training and one evaluation row per step (an evaluation row has eval_loss); a second one replaces the first.
  virtual absl::Status PutMetric(const std::string& job_id, const v1::MetricRow& row) = 0;
  virtual absl::StatusOr<std::vector<v1::MetricRow>> ListMetrics(const std::string& job_id, int64_t after_step, int limit) = 0;  // training before evaluation
  // The newest training (or evaluation) row, if there is one.
  virtual absl::StatusOr<std::optional<v1::MetricRow>> NewestMetric(const std::string& job_id, bool evaluation) = 0;
  virtual absl::Status DeleteMetricsAfter(const std::string& job_id, int64_t step) = 0;  // -1 = all

  // Checkpoints by (job, step). Putting one again replaces it.
  virtual absl::Status PutCheckpoint(const v1::CheckpointManifest& manifest) = 0;
  virtual absl::Status DeleteCheckpoint(const std::string& job_id, int64_t step) = 0;
  virtual absl::StatusOr<std::vector<v1::CheckpointManifest>> ListCheckpoints(const std::string& job_id) = 0;  // by step

  // Reports that wait for their peers. kind is the number of the field in TrainerReport's oneof.
  virtual absl::Status PutRankReport(const v1::RankKey& rank, int kind, int64_t step, const v1::TrainerReport& report) = 0;
  virtual absl::StatusOr<std::vector<RankReportRow>> ListRankReports(const std::string& job_id, int64_t epoch, int kind) = 0;  // by step, rank
  virtual absl::Status DeleteRankReports(const std::string& job_id, int kind, int64_t up_to_step) = 0;
  virtual absl::Status DeleteRankReports(const std::string& job_id) = 0;

  // Workers.
  virtual absl::Status PutWorker(const WorkerRow& worker) = 0;
  virtual absl::StatusOr<std::vector<WorkerRow>> LoadWorkers() = 0;

  // Blobs: rows exist only for files that are complete.
  virtual absl::Status PutBlob(const BlobRow& blob) = 0;  // an existing row stays
  virtual absl::StatusOr<std::optional<BlobRow>> GetBlob(const std::string& sha256) = 0;
  virtual absl::Status DeleteBlob(const std::string& sha256) = 0;
  // Blobs made before that nothing refers to (see IsReferenced); some of them.
  virtual absl::StatusOr<std::vector<std::string>> ListUnusedBlobs(absl::Time before) = 0;
  // True if a dataset, model, artifact, checkpoint or a job's prepared data still names the content.
  virtual absl::StatusOr<bool> IsReferenced(const std::string& sha256) = 0;

  // Datasets. The same content is the same id; ALREADY_EXISTS is never answered: putting one again keeps the first row.
  virtual absl::Status PutDataset(const v1::Dataset& dataset) = 0;
  virtual absl::StatusOr<v1::Dataset> GetDataset(const std::string& id) = 0;
  virtual absl::StatusOr<std::vector<v1::Dataset>> FindDatasetsByName(const std::string& name) = 0;
  virtual absl::StatusOr<std::vector<v1::Dataset>> ListDatasets(const Page& page) = 0;  // by id

  // Models by name. ALREADY_EXISTS if the name is taken.
  virtual absl::Status InsertModel(const v1::ModelRecord& model) = 0;
  virtual absl::StatusOr<v1::ModelRecord> GetModel(const std::string& name) = 0;
  virtual absl::StatusOr<std::vector<v1::Model>> ListModels(const Page& page) = 0;  // by name

  // Artifacts by (id, type): final models ("job-…"), uploaded adapters ("adapter-…").
  virtual absl::Status PutArtifact(const v1::ArtifactManifest& manifest) = 0;
  virtual absl::StatusOr<v1::ArtifactManifest> GetArtifact(const std::string& id, const std::string& type) = 0;
  virtual absl::StatusOr<std::vector<v1::ArtifactManifest>> ListArtifacts(const std::string& job_id) = 0;
};

}  // namespace ppft::coordinator
