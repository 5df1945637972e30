#include "coordinator/store/sqlite_job_store.h"

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "coordinator/store/migrations.h"
#include "coordinator/store/sqlite.h"
#include "coordinator/store/sqlite_tables.h"

namespace ppft::coordinator {
namespace {

// Lines kept per job; the oldest go first.
constexpr int64_t kMaxLogLines = 20000;
constexpr int64_t kLogTrimInterval = 1000;

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

}  // namespace

absl::Status SqliteJobStore::RollbackTo() {
  PPFT_RETURN_IF_ERROR(db_->Prepare("ROLLBACK TO s").Run());
  return Release();
}

absl::StatusOr<int64_t> SqliteJobStore::NextStart() {
  PPFT_RETURN_IF_ERROR(db_->Execute("INSERT INTO starts DEFAULT VALUES"));
  return db_->last_insert_rowid();
}

absl::Status SqliteJobStore::InsertJob(const v1::JobRecord& record) {
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

absl::Status SqliteJobStore::UpdateJob(const v1::JobRecord& record, int64_t epoch) {
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

absl::Status SqliteJobStore::UpdateJobStatus(const v1::Job& job, int64_t epoch) {
  PPFT_RETURN_IF_ERROR(db_->Prepare("UPDATE jobs SET state = ?, seq = ?, head = ? WHERE id = ? AND epoch = ?")
                           .Bind(job.status().state())
                           .Bind(job.seq())
                           .Bind(Serialize(HeadOf(job)))
                           .Bind(job.id())
                           .Bind(epoch)
                           .Run());
  return CheckOneChanged(job.id(), epoch);
}

absl::StatusOr<std::vector<v1::JobRecord>> SqliteJobStore::LoadJobs() {
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

absl::StatusOr<std::optional<std::string>> SqliteJobStore::FindRequest(const std::string& method, const std::string& request_id,
                                                                       const std::string& payload_sha256) {
  Query query = db_->Prepare("SELECT payload_sha256, resource_id FROM requests WHERE method = ? AND request_id = ?");
  PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(method).Bind(request_id).Step());
  if (!row) return std::optional<std::string>();
  if (query.Text(0) != payload_sha256) {
    return absl::AlreadyExistsError(absl::StrCat("request_id \"", request_id, "\" was used before for another ", method, " (it made ", query.Text(1),
                                                 "): use a new request_id for a new request"));
  }
  return std::optional<std::string>(query.Text(1));
}

absl::Status SqliteJobStore::PutRequest(const std::string& method, const std::string& request_id, const std::string& payload_sha256,
                                        const std::string& resource_id) {
  return db_->Prepare("INSERT INTO requests (method, request_id, payload_sha256, resource_id) VALUES (?, ?, ?, ?)")
      .Bind(method)
      .Bind(request_id)
      .Bind(payload_sha256)
      .Bind(resource_id)
      .Run();
}

absl::StatusOr<int64_t> SqliteJobStore::AppendEvent(const v1::Event& event) {
  PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT INTO events (job_id, event) VALUES (?, ?)").Bind(event.job_id()).Bind(Serialize(event)).Run());
  return db_->last_insert_rowid();
}

absl::StatusOr<std::vector<v1::Event>> SqliteJobStore::ListEvents(const std::string& job_id, int64_t after_seq, int limit) {
  Query query = db_->Prepare("SELECT seq, event FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?");
  query.Bind(job_id).Bind(after_seq).Bind(limit);
  return CollectWithSeq<v1::Event>(query, "events");
}

absl::StatusOr<int64_t> SqliteJobStore::AppendLog(const std::string& job_id, const v1::LogLine& line) {
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

absl::StatusOr<std::vector<v1::LogLine>> SqliteJobStore::ListLogs(const std::string& job_id, int64_t after_seq, int limit) {
  Query query = db_->Prepare("SELECT seq, line FROM logs WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?");
  query.Bind(job_id).Bind(after_seq).Bind(limit);
  return CollectWithSeq<v1::LogLine>(query, "logs");
}

absl::Status SqliteJobStore::PutMetric(const std::string& job_id, const v1::MetricRow& row) {
  return db_->Prepare("INSERT OR REPLACE INTO metrics (job_id, step, kind, row) VALUES (?, ?, ?, ?)")
      .Bind(job_id)
      .Bind(row.step())
      .Bind(int64_t{row.has_eval_loss()})
      .Bind(Serialize(row))
      .Run();
}

absl::StatusOr<std::vector<v1::MetricRow>> SqliteJobStore::ListMetrics(const std::string& job_id, int64_t after_step, int limit) {
  Query query = db_->Prepare("SELECT row FROM metrics WHERE job_id = ? AND step > ? ORDER BY step, kind LIMIT ?");
  query.Bind(job_id).Bind(after_step).Bind(limit);
  return Collect<v1::MetricRow>(query, 0, "metrics");
}

absl::StatusOr<std::optional<v1::MetricRow>> SqliteJobStore::NewestMetric(const std::string& job_id, bool evaluation) {
  Query query = db_->Prepare("SELECT row FROM metrics WHERE job_id = ? AND kind = ? ORDER BY step DESC LIMIT 1");
  PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(job_id).Bind(int64_t{evaluation}).Step());
  if (!row) return std::optional<v1::MetricRow>();
  PPFT_ASSIGN_OR_RETURN(v1::MetricRow metric, Parse<v1::MetricRow>(query.Text(0), "metrics"));
  return std::optional<v1::MetricRow>(std::move(metric));
}

absl::Status SqliteJobStore::DeleteMetricsAfter(const std::string& job_id, int64_t step) {
  return db_->Prepare("DELETE FROM metrics WHERE job_id = ? AND step > ?").Bind(job_id).Bind(step).Run();
}

absl::Status SqliteJobStore::PutWorker(const WorkerRow& worker) {
  return db_->Prepare("INSERT OR REPLACE INTO workers (name, incarnation, acked_seq, num_gpus, gpus_away_ms) VALUES (?, ?, ?, ?, ?)")
      .Bind(worker.name)
      .Bind(worker.incarnation)
      .Bind(worker.acked_seq)
      .Bind(worker.num_gpus)
      .Bind(worker.gpus_away_unix_ms)
      .Run();
}

absl::StatusOr<std::vector<WorkerRow>> SqliteJobStore::LoadWorkers() {
  Query query = db_->Prepare("SELECT name, incarnation, acked_seq, num_gpus, gpus_away_ms FROM workers ORDER BY name");
  std::vector<WorkerRow> rows;
  while (true) {
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
    if (!row) return rows;
    rows.push_back(WorkerRow{query.Text(0), query.Text(1), query.Int(2), static_cast<int32_t>(query.Int(3)), query.Int(4)});
  }
}

absl::Status SqliteJobStore::CheckOneChanged(const std::string& job_id, int64_t epoch) {
  if (db_->changes() == 1) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("STALE_EPOCH: job ", job_id, " is not at epoch ", epoch, " any more"));
}

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
