#include "coordinator/store/sqlite_job_store.h"

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "coordinator/store/migrations.h"
#include "coordinator/store/sqlite.h"

namespace ppft::coordinator {
namespace {

// Lines kept per job; the oldest go first.
constexpr int64_t kMaxLogLines = 20000;
constexpr int64_t kLogTrimInterval = 1000;

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

v1::Job HeadOf(const v1::Job& job) {
  v1::Job head = job;
  head.clear_spec();
  return head;
}

v1::JobRecord TailOf(const v1::JobRecord& record) {
  v1::JobRecord tail = record;
  tail.clear_job();
  return tail;
}

class SqliteJobStore : public JobStore {
 public:
  explicit SqliteJobStore(std::unique_ptr<Database> db) : db_(std::move(db)) {}

  absl::Status Begin() override { return db_->Execute("BEGIN IMMEDIATE"); }
  absl::Status Commit() override { return db_->Execute("COMMIT"); }
  void Rollback() override { db_->Execute("ROLLBACK").IgnoreError(); }  // fails only if SQLite rolled back by itself
  absl::Status Savepoint() override { return db_->Prepare("SAVEPOINT s").Run(); }
  absl::Status Release() override { return db_->Prepare("RELEASE s").Run(); }
  absl::Status RollbackTo() override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("ROLLBACK TO s").Run());
    return Release();
  }

  absl::StatusOr<int64_t> NextStart() override {
    PPFT_RETURN_IF_ERROR(db_->Execute("INSERT INTO starts DEFAULT VALUES"));
    return db_->last_insert_rowid();
  }

  absl::Status InsertJob(const v1::JobRecord& record) override {
    const v1::Job& job = record.job();
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT INTO jobs (id, request_id, name, state, epoch, priority, submit_order, seq, head, spec, record) "
                                      "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
                             .Bind(job.id())
                             .Bind(job.request_id())
                             .Bind(job.name())
                             .Bind(job.status().state())
                             .Bind(job.status().attempt_epoch())
                             .Bind(job.spec().priority())
                             .Bind(record.submit_order())
                             .Bind(job.seq())
                             .Bind(Serialize(HeadOf(job)))
                             .Bind(Serialize(job.spec()))
                             .Bind(Serialize(TailOf(record)))
                             .Run());
    return SetPreparedRefs(record);
  }

  absl::Status UpdateJob(const v1::JobRecord& record, int64_t epoch) override {
    const v1::Job& job = record.job();
    PPFT_RETURN_IF_ERROR(db_->Prepare("UPDATE jobs SET state = ?, epoch = ?, seq = ?, head = ?, record = ? WHERE id = ? AND epoch = ?")
                             .Bind(job.status().state())
                             .Bind(job.status().attempt_epoch())
                             .Bind(job.seq())
                             .Bind(Serialize(HeadOf(job)))
                             .Bind(Serialize(TailOf(record)))
                             .Bind(job.id())
                             .Bind(epoch)
                             .Run());
    PPFT_RETURN_IF_ERROR(CheckOneChanged(job.id(), epoch));
    return SetPreparedRefs(record);
  }

  absl::Status UpdateJobStatus(const v1::Job& job, int64_t epoch) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("UPDATE jobs SET state = ?, seq = ?, head = ? WHERE id = ? AND epoch = ?")
                             .Bind(job.status().state())
                             .Bind(job.seq())
                             .Bind(Serialize(HeadOf(job)))
                             .Bind(job.id())
                             .Bind(epoch)
                             .Run());
    return CheckOneChanged(job.id(), epoch);
  }

  absl::StatusOr<std::vector<v1::JobRecord>> LoadJobs() override {
    Query query = db_->Prepare("SELECT head, spec, record FROM jobs ORDER BY submit_order");
    std::vector<v1::JobRecord> jobs;
    while (true) {
      PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
      if (!row) return jobs;
      PPFT_ASSIGN_OR_RETURN(v1::JobRecord record, Parse<v1::JobRecord>(query.Text(2), "jobs"));
      PPFT_ASSIGN_OR_RETURN(*record.mutable_job(), Parse<v1::Job>(query.Text(0), "jobs"));
      PPFT_ASSIGN_OR_RETURN(*record.mutable_job()->mutable_spec(), Parse<v1::JobSpec>(query.Text(1), "jobs"));
      jobs.push_back(std::move(record));
    }
  }

  absl::StatusOr<absl::optional<std::string>> FindRequest(const std::string& method, const std::string& request_id,
                                                          const std::string& payload_sha256) override {
    Query query = db_->Prepare("SELECT payload_sha256, resource_id FROM requests WHERE method = ? AND request_id = ?");
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(method).Bind(request_id).Step());
    if (!row) return absl::optional<std::string>();
    if (query.Text(0) != payload_sha256) {
      return absl::AlreadyExistsError(absl::StrCat("request_id \"", request_id, "\" was used before for another ", method, " (it made ", query.Text(1),
                                                   "): use a new request_id for a new request"));
    }
    return absl::optional<std::string>(query.Text(1));
  }

  absl::Status PutRequest(const std::string& method, const std::string& request_id, const std::string& payload_sha256,
                          const std::string& resource_id) override {
    return db_->Prepare("INSERT INTO requests (method, request_id, payload_sha256, resource_id) VALUES (?, ?, ?, ?)")
        .Bind(method)
        .Bind(request_id)
        .Bind(payload_sha256)
        .Bind(resource_id)
        .Run();
  }

  absl::StatusOr<int64_t> AppendEvent(const v1::Event& event) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT INTO events (job_id, event) VALUES (?, ?)").Bind(event.job_id()).Bind(Serialize(event)).Run());
    return db_->last_insert_rowid();
  }

  absl::StatusOr<std::vector<v1::Event>> ListEvents(const std::string& job_id, int64_t after_seq, int limit) override {
    Query query = db_->Prepare("SELECT seq, event FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?");
    query.Bind(job_id).Bind(after_seq).Bind(limit);
    return CollectWithSeq<v1::Event>(query, "events");
  }

  absl::StatusOr<int64_t> AppendLog(const std::string& job_id, const v1::LogLine& line) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT INTO logs (job_id, line) VALUES (?, ?)").Bind(job_id).Bind(Serialize(line)).Run());
    const int64_t seq = db_->last_insert_rowid();
    if (seq % kLogTrimInterval == 0) {
      PPFT_RETURN_IF_ERROR(db_->Prepare("DELETE FROM logs WHERE job_id = ?1 AND seq <= "
                                        "(SELECT seq FROM logs WHERE job_id = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2)")
                               .Bind(job_id)
                               .Bind(kMaxLogLines)
                               .Run());
    }
    return seq;
  }

  absl::StatusOr<std::vector<v1::LogLine>> ListLogs(const std::string& job_id, int64_t after_seq, int limit) override {
    Query query = db_->Prepare("SELECT seq, line FROM logs WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?");
    query.Bind(job_id).Bind(after_seq).Bind(limit);
    return CollectWithSeq<v1::LogLine>(query, "logs");
  }

  absl::Status PutMetric(const std::string& job_id, const v1::MetricRow& row) override {
    return db_->Prepare("INSERT OR REPLACE INTO metrics (job_id, step, kind, row) VALUES (?, ?, ?, ?)")
        .Bind(job_id)
        .Bind(row.step())
        .Bind(int64_t{row.has_eval_loss()})
        .Bind(Serialize(row))
        .Run();
  }

  absl::StatusOr<std::vector<v1::MetricRow>> ListMetrics(const std::string& job_id, int64_t after_step, int limit) override {
    Query query = db_->Prepare("SELECT row FROM metrics WHERE job_id = ? AND step > ? ORDER BY step, kind LIMIT ?");
    query.Bind(job_id).Bind(after_step).Bind(limit);
    return Collect<v1::MetricRow>(query, 0, "metrics");
  }

  absl::StatusOr<absl::optional<v1::MetricRow>> NewestMetric(const std::string& job_id, bool evaluation) override {
    Query query = db_->Prepare("SELECT row FROM metrics WHERE job_id = ? AND kind = ? ORDER BY step DESC LIMIT 1");
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(job_id).Bind(int64_t{evaluation}).Step());
    if (!row) return absl::optional<v1::MetricRow>();
    PPFT_ASSIGN_OR_RETURN(v1::MetricRow metric, Parse<v1::MetricRow>(query.Text(0), "metrics"));
    return absl::optional<v1::MetricRow>(std::move(metric));
  }

  absl::Status DeleteMetricsAfter(const std::string& job_id, int64_t step) override {
    return db_->Prepare("DELETE FROM metrics WHERE job_id = ? AND step > ?").Bind(job_id).Bind(step).Run();
  }

  absl::Status PutCheckpoint(const v1::CheckpointManifest& manifest) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT OR REPLACE INTO checkpoints (job_id, step, epoch, manifest) VALUES (?, ?, ?, ?)")
                             .Bind(manifest.job_id())
                             .Bind(manifest.state().step())
                             .Bind(manifest.epoch())
                             .Bind(Serialize(manifest))
                             .Run());
    return SetRefs(CheckpointOwner(manifest.job_id(), manifest.state().step()), manifest.files());
  }

  absl::Status DeleteCheckpoint(const std::string& job_id, int64_t step) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("DELETE FROM checkpoints WHERE job_id = ? AND step = ?").Bind(job_id).Bind(step).Run());
    return DropRefs(CheckpointOwner(job_id, step));
  }

  absl::StatusOr<std::vector<v1::CheckpointManifest>> ListCheckpoints(const std::string& job_id) override {
    Query query = db_->Prepare("SELECT manifest FROM checkpoints WHERE job_id = ? ORDER BY step");
    query.Bind(job_id);
    return Collect<v1::CheckpointManifest>(query, 0, "checkpoints");
  }

  absl::Status PutRankReport(const v1::RankKey& rank, int kind, int64_t step, const v1::TrainerReport& report) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT OR REPLACE INTO rank_reports (job_id, epoch, kind, step, rank, report) VALUES (?, ?, ?, ?, ?, ?)")
                             .Bind(rank.job_id())
                             .Bind(rank.epoch())
                             .Bind(kind)
                             .Bind(step)
                             .Bind(rank.rank())
                             .Bind(Serialize(report))
                             .Run());
    const std::string owner = ReportOwner(rank.job_id(), kind, step, absl::StrCat(rank.epoch(), "/", rank.rank()));
    for (const v1::LocalFile& file : report.checkpoint().files()) PPFT_RETURN_IF_ERROR(AddRef(owner, file.content().sha256()));
    for (const v1::LocalFile& file : report.exported().adapter_files()) PPFT_RETURN_IF_ERROR(AddRef(owner, file.content().sha256()));
    for (const v1::LocalFile& file : report.exported().merged_files()) PPFT_RETURN_IF_ERROR(AddRef(owner, file.content().sha256()));
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<RankReportRow>> ListRankReports(const std::string& job_id, int64_t epoch, int kind) override {
    Query query = db_->Prepare("SELECT rank, step, report FROM rank_reports WHERE job_id = ? AND epoch = ? AND kind = ? ORDER BY step, rank");
    query.Bind(job_id).Bind(epoch).Bind(kind);
    std::vector<RankReportRow> rows;
    while (true) {
      PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
      if (!row) return rows;
      PPFT_ASSIGN_OR_RETURN(v1::TrainerReport report, Parse<v1::TrainerReport>(query.Text(2), "rank_reports"));
      rows.push_back(RankReportRow{static_cast<int32_t>(query.Int(0)), query.Int(1), std::move(report)});
    }
  }

  absl::Status DeleteRankReports(const std::string& job_id, int kind, int64_t up_to_step) override {
    {
      Query query = db_->Prepare("SELECT DISTINCT step FROM rank_reports WHERE job_id = ? AND kind = ? AND step <= ?");
      query.Bind(job_id).Bind(kind).Bind(up_to_step);
      while (true) {
        PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
        if (!row) break;
        PPFT_RETURN_IF_ERROR(DropRefsBelow(ReportOwner(job_id, kind, query.Int(0), "")));
      }
    }
    return db_->Prepare("DELETE FROM rank_reports WHERE job_id = ? AND kind = ? AND step <= ?").Bind(job_id).Bind(kind).Bind(up_to_step).Run();
  }

  absl::Status DeleteRankReports(const std::string& job_id) override {
    PPFT_RETURN_IF_ERROR(DropRefsBelow(absl::StrCat("report/", job_id, "/")));
    return db_->Prepare("DELETE FROM rank_reports WHERE job_id = ?").Bind(job_id).Run();
  }

  absl::Status PutWorker(const WorkerRow& worker) override {
    return db_->Prepare("INSERT OR REPLACE INTO workers (name, incarnation, acked_seq) VALUES (?, ?, ?)")
        .Bind(worker.name)
        .Bind(worker.incarnation)
        .Bind(worker.acked_seq)
        .Run();
  }

  absl::StatusOr<std::vector<WorkerRow>> LoadWorkers() override {
    Query query = db_->Prepare("SELECT name, incarnation, acked_seq FROM workers ORDER BY name");
    std::vector<WorkerRow> rows;
    while (true) {
      PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
      if (!row) return rows;
      rows.push_back(WorkerRow{query.Text(0), query.Text(1), query.Int(2)});
    }
  }

  absl::Status PutBlob(const BlobRow& blob) override {
    return db_->Prepare("INSERT OR IGNORE INTO blobs (sha256, size_bytes, create_ms) VALUES (?, ?, ?)")
        .Bind(blob.sha256)
        .Bind(blob.size_bytes)
        .Bind(absl::ToUnixMillis(blob.create_time))
        .Run();
  }

  absl::StatusOr<absl::optional<BlobRow>> GetBlob(const std::string& sha256) override {
    Query query = db_->Prepare("SELECT size_bytes, create_ms FROM blobs WHERE sha256 = ?");
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(sha256).Step());
    if (!row) return absl::optional<BlobRow>();
    return absl::optional<BlobRow>(BlobRow{sha256, query.Int(0), absl::FromUnixMillis(query.Int(1))});
  }

  absl::Status DeleteBlob(const std::string& sha256) override { return db_->Prepare("DELETE FROM blobs WHERE sha256 = ?").Bind(sha256).Run(); }

  absl::StatusOr<bool> IsReferenced(const std::string& sha256) override {
    return db_->Prepare("SELECT 1 FROM content_refs WHERE sha256 = ? LIMIT 1").Bind(sha256).Step();
  }

  absl::Status PutDataset(const v1::Dataset& dataset) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT OR IGNORE INTO datasets (id, name, dataset) VALUES (?, ?, ?)")
                             .Bind(dataset.id())
                             .Bind(dataset.name())
                             .Bind(Serialize(dataset))
                             .Run());
    return AddRef(absl::StrCat("dataset/", dataset.id()), dataset.sha256());
  }

  absl::StatusOr<v1::Dataset> GetDataset(const std::string& id) override {
    Query query = db_->Prepare("SELECT dataset FROM datasets WHERE id = ?");
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(id).Step());
    if (!row) return absl::NotFoundError(absl::StrCat("no dataset \"", id, "\": see `ppctl data list`"));
    return Parse<v1::Dataset>(query.Text(0), "datasets");
  }

  absl::StatusOr<std::vector<v1::Dataset>> FindDatasetsByName(const std::string& name) override {
    Query query = db_->Prepare("SELECT dataset FROM datasets WHERE name = ? ORDER BY id");
    query.Bind(name);
    return Collect<v1::Dataset>(query, 0, "datasets");
  }

  absl::StatusOr<std::vector<v1::Dataset>> ListDatasets(const Page& page) override {
    Query query = db_->Prepare("SELECT dataset FROM datasets WHERE id > ? ORDER BY id LIMIT ?");
    query.Bind(page.after).Bind(page.limit);
    return Collect<v1::Dataset>(query, 0, "datasets");
  }

  absl::Status InsertModel(const v1::ModelRecord& model) override {
    Query taken = db_->Prepare("SELECT 1 FROM models WHERE name = ?");
    PPFT_ASSIGN_OR_RETURN(const bool row, taken.Bind(model.model().name()).Step());
    if (row) return absl::AlreadyExistsError(absl::StrCat("a model \"", model.model().name(), "\" is registered already: choose another name"));
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT INTO models (name, model, record) VALUES (?, ?, ?)")
                             .Bind(model.model().name())
                             .Bind(Serialize(model.model()))
                             .Bind(Serialize(model))
                             .Run());
    return SetRefs(absl::StrCat("model/", model.model().name()), model.files());
  }

  absl::StatusOr<v1::ModelRecord> GetModel(const std::string& name) override {
    Query query = db_->Prepare("SELECT record FROM models WHERE name = ?");
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(name).Step());
    if (!row) return absl::NotFoundError(absl::StrCat("no model \"", name, "\": see `ppctl models list`"));
    return Parse<v1::ModelRecord>(query.Text(0), "models");
  }

  absl::StatusOr<std::vector<v1::Model>> ListModels(const Page& page) override {
    Query query = db_->Prepare("SELECT model FROM models WHERE name > ? ORDER BY name LIMIT ?");
    query.Bind(page.after).Bind(page.limit);
    return Collect<v1::Model>(query, 0, "models");
  }

  absl::Status PutArtifact(const v1::ArtifactManifest& manifest) override {
    PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT OR REPLACE INTO artifacts (id, type, job_id, manifest) VALUES (?, ?, ?, ?)")
                             .Bind(manifest.id())
                             .Bind(manifest.type())
                             .Bind(manifest.job_id())
                             .Bind(Serialize(manifest))
                             .Run());
    return SetRefs(absl::StrCat("artifact/", manifest.id(), "/", manifest.type()), manifest.files());
  }

  absl::StatusOr<v1::ArtifactManifest> GetArtifact(const std::string& id, const std::string& type) override {
    Query query = db_->Prepare("SELECT manifest FROM artifacts WHERE id = ? AND type = ?");
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(id).Bind(type).Step());
    if (!row) return absl::NotFoundError(absl::StrCat("no artifact \"", id, "\" of type ", type));
    return Parse<v1::ArtifactManifest>(query.Text(0), "artifacts");
  }

  absl::StatusOr<std::vector<v1::ArtifactManifest>> ListArtifacts(const std::string& job_id) override {
    Query query = db_->Prepare("SELECT manifest FROM artifacts WHERE job_id = ? ORDER BY type");
    query.Bind(job_id);
    return Collect<v1::ArtifactManifest>(query, 0, "artifacts");
  }

 private:
  static std::string CheckpointOwner(const std::string& job_id, int64_t step) { return absl::StrCat("checkpoint/", job_id, "/", step); }
  static std::string ReportOwner(const std::string& job_id, int kind, int64_t step, const std::string& rest) {
    return absl::StrCat("report/", job_id, "/", kind, "/", step, "/", rest);
  }

  // Rows of (seq, message): the message gets its seq.
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

  absl::Status CheckOneChanged(const std::string& job_id, int64_t epoch) {
    if (db_->changes() == 1) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("STALE_EPOCH: job ", job_id, " is not at epoch ", epoch, " any more"));
  }

  absl::Status AddRef(const std::string& owner, const std::string& sha256) {
    return db_->Prepare("INSERT OR IGNORE INTO content_refs (owner, sha256) VALUES (?, ?)").Bind(owner).Bind(sha256).Run();
  }
  absl::Status DropRefs(const std::string& owner) { return db_->Prepare("DELETE FROM content_refs WHERE owner = ?").Bind(owner).Run(); }
  // Of all owners that begin with `prefix`, which ends with '/': '0' is the next character.
  absl::Status DropRefsBelow(std::string prefix) {
    std::string end = prefix;
    end.back() = '0';
    return db_->Prepare("DELETE FROM content_refs WHERE owner >= ? AND owner < ?").Bind(prefix).Bind(end).Run();
  }
  template <typename Files>
  absl::Status SetRefs(const std::string& owner, const Files& files) {
    PPFT_RETURN_IF_ERROR(DropRefs(owner));
    for (const v1::FileRef& file : files) PPFT_RETURN_IF_ERROR(AddRef(owner, file.sha256()));
    return absl::OkStatus();
  }
  absl::Status SetPreparedRefs(const v1::JobRecord& record) {
    if (!record.has_prepared()) return absl::OkStatus();
    const std::string owner = absl::StrCat("prepared/", record.job().id());
    PPFT_RETURN_IF_ERROR(AddRef(owner, record.prepared().train_tokens().sha256()));
    if (record.prepared().has_eval_tokens()) PPFT_RETURN_IF_ERROR(AddRef(owner, record.prepared().eval_tokens().sha256()));
    return absl::OkStatus();
  }

  const std::unique_ptr<Database> db_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<JobStore>> OpenSqliteJobStore(const std::string& data_dir) {
  if (const absl::Status made = MakeDirs(data_dir); !made.ok()) {
    return absl::Status(made.code(), absl::StrCat("data_dir ", data_dir, " cannot be made: ", made.message()));
  }
  PPFT_ASSIGN_OR_RETURN(std::unique_ptr<Database> db, Database::Open(JoinPath(data_dir, kStoreFile), data_dir));
  if (absl::Status status = Migrate(*db, Migrations()); !status.ok()) return Annotate(status, absl::StrCat("data_dir ", data_dir));
  if (absl::Status status = SyncPath(data_dir); !status.ok()) return status;
  return std::unique_ptr<JobStore>(std::make_unique<SqliteJobStore>(std::move(db)));
}

}  // namespace ppft::coordinator
