// Contents on disk and what names them: checkpoints, waiting reports, blobs, datasets, models, artifacts.
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/spec/suggest.h"
#include "coordinator/store/sqlite_tables.h"

namespace ppft::coordinator {
namespace {

constexpr int64_t kUnusedPerSweep = 1000;

std::string CheckpointOwner(const std::string& job_id, int64_t step) { return absl::StrCat("checkpoint/", job_id, "/", step); }

std::string ReportOwner(const std::string& job_id, int kind, int64_t step, const std::string& rest) {
  return absl::StrCat("report/", job_id, "/", kind, "/", step, "/", rest);
}

}  // namespace

absl::Status SqliteJobStore::PutCheckpoint(const v1::CheckpointManifest& manifest) {
  PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT OR REPLACE INTO checkpoints (job_id, step, epoch, manifest) VALUES (?, ?, ?, ?)")
                           .Bind(manifest.job_id())
                           .Bind(manifest.state().step())
                           .Bind(manifest.epoch())
                           .Bind(Serialize(manifest))
                           .Run());
  return SetRefs(CheckpointOwner(manifest.job_id(), manifest.state().step()), manifest.files());
}

absl::Status SqliteJobStore::DeleteCheckpoint(const std::string& job_id, int64_t step) {
  PPFT_RETURN_IF_ERROR(db_->Prepare("DELETE FROM checkpoints WHERE job_id = ? AND step = ?").Bind(job_id).Bind(step).Run());
  return DropRefs(CheckpointOwner(job_id, step));
}

absl::StatusOr<std::vector<v1::CheckpointManifest>> SqliteJobStore::ListCheckpoints(const std::string& job_id) {
  Query query = db_->Prepare("SELECT manifest FROM checkpoints WHERE job_id = ? ORDER BY step");
  query.Bind(job_id);
  return Collect<v1::CheckpointManifest>(query, 0, "checkpoints");
}

absl::Status SqliteJobStore::PutRankReport(const v1::RankKey& rank, int kind, int64_t step, const v1::TrainerReport& report) {
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

absl::StatusOr<std::vector<RankReportRow>> SqliteJobStore::ListRankReports(const std::string& job_id, int64_t epoch, int kind) {
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

absl::Status SqliteJobStore::DeleteRankReports(const std::string& job_id, int kind, int64_t up_to_step) {
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

absl::Status SqliteJobStore::DeleteRankReports(const std::string& job_id) {
  PPFT_RETURN_IF_ERROR(DropRefsBelow(absl::StrCat("report/", job_id, "/")));
  return db_->Prepare("DELETE FROM rank_reports WHERE job_id = ?").Bind(job_id).Run();
}

absl::Status SqliteJobStore::PutBlob(const BlobRow& blob) {
  return db_->Prepare("INSERT OR IGNORE INTO blobs (sha256, size_bytes, create_ms) VALUES (?, ?, ?)")
      .Bind(blob.sha256)
      .Bind(blob.size_bytes)
      .Bind(absl::ToUnixMillis(blob.create_time))
      .Run();
}

absl::StatusOr<std::optional<BlobRow>> SqliteJobStore::GetBlob(const std::string& sha256) {
  Query query = db_->Prepare("SELECT size_bytes, create_ms FROM blobs WHERE sha256 = ?");
  PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(sha256).Step());
  if (!row) return std::optional<BlobRow>();
  return std::optional<BlobRow>(BlobRow{sha256, query.Int(0), absl::FromUnixMillis(query.Int(1))});
}

absl::Status SqliteJobStore::DeleteBlob(const std::string& sha256) { return db_->Prepare("DELETE FROM blobs WHERE sha256 = ?").Bind(sha256).Run(); }

absl::StatusOr<bool> SqliteJobStore::IsReferenced(const std::string& sha256) {
  return db_->Prepare("SELECT 1 FROM content_refs WHERE sha256 = ? LIMIT 1").Bind(sha256).Step();
}

absl::Status SqliteJobStore::PutDataset(const v1::Dataset& dataset) {
  PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT OR IGNORE INTO datasets (id, name, dataset) VALUES (?, ?, ?)")
                           .Bind(dataset.id())
                           .Bind(dataset.name())
                           .Bind(Serialize(dataset))
                           .Run());
  return AddRef(absl::StrCat("dataset/", dataset.id()), dataset.sha256());
}

absl::Status SqliteJobStore::NotFound(absl::string_view kind, const std::string& word, const char* names_sql, absl::string_view command) {
  Query query = db_->Prepare(names_sql);
  std::vector<std::string> names;
  while (true) {
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
    if (!row) break;
    names.push_back(query.Text(0));
    names.push_back(query.Text(1));
  }
  return absl::NotFoundError(spec::NotThere(kind, word, names, command));
}

absl::StatusOr<v1::Dataset> SqliteJobStore::GetDataset(const std::string& id) {
  Query query = db_->Prepare("SELECT dataset FROM datasets WHERE id = ?");
  PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(id).Step());
  if (!row) return NotFound("dataset", id, "SELECT id, name FROM datasets ORDER BY rowid DESC LIMIT 1000", "ppctl data list");
  return Parse<v1::Dataset>(query.Text(0), "datasets");
}

absl::StatusOr<std::vector<v1::Dataset>> SqliteJobStore::FindDatasetsByName(const std::string& name) {
  Query query = db_->Prepare("SELECT dataset FROM datasets WHERE name = ? ORDER BY id");
  query.Bind(name);
  return Collect<v1::Dataset>(query, 0, "datasets");
}

absl::StatusOr<std::vector<v1::Dataset>> SqliteJobStore::ListDatasets(const Page& page) {
  Query query = db_->Prepare("SELECT dataset FROM datasets WHERE id > ? ORDER BY id LIMIT ?");
  query.Bind(page.after).Bind(page.limit);
  return Collect<v1::Dataset>(query, 0, "datasets");
}

absl::Status SqliteJobStore::InsertModel(const v1::ModelRecord& model) {
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

absl::StatusOr<v1::ModelRecord> SqliteJobStore::GetModel(const std::string& name) {
  Query query = db_->Prepare("SELECT record FROM models WHERE name = ?");
  PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(name).Step());
  if (!row) return NotFound("model", name, "SELECT name, name FROM models LIMIT 1000", "ppctl models list");
  return Parse<v1::ModelRecord>(query.Text(0), "models");
}

absl::StatusOr<std::vector<v1::Model>> SqliteJobStore::ListModels(const Page& page) {
  Query query = db_->Prepare("SELECT model FROM models WHERE name > ? ORDER BY name LIMIT ?");
  query.Bind(page.after).Bind(page.limit);
  return Collect<v1::Model>(query, 0, "models");
}

absl::Status SqliteJobStore::PutArtifact(const v1::ArtifactManifest& manifest) {
  PPFT_RETURN_IF_ERROR(db_->Prepare("INSERT OR REPLACE INTO artifacts (id, type, job_id, manifest) VALUES (?, ?, ?, ?)")
                           .Bind(manifest.id())
                           .Bind(manifest.type())
                           .Bind(manifest.job_id())
                           .Bind(Serialize(manifest))
                           .Run());
  return SetRefs(absl::StrCat("artifact/", manifest.id(), "/", manifest.type()), manifest.files());
}

absl::StatusOr<v1::ArtifactManifest> SqliteJobStore::GetArtifact(const std::string& id, const std::string& type) {
  Query query = db_->Prepare("SELECT manifest FROM artifacts WHERE id = ? AND type = ?");
  PPFT_ASSIGN_OR_RETURN(const bool row, query.Bind(id).Bind(type).Step());
  if (!row) return absl::NotFoundError(absl::StrCat("no artifact \"", id, "\" of type ", type));
  return Parse<v1::ArtifactManifest>(query.Text(0), "artifacts");
}

absl::StatusOr<std::vector<v1::ArtifactManifest>> SqliteJobStore::ListArtifacts(const std::string& job_id) {
  Query query = db_->Prepare("SELECT manifest FROM artifacts WHERE job_id = ? ORDER BY type");
  query.Bind(job_id);
  return Collect<v1::ArtifactManifest>(query, 0, "artifacts");
}

absl::StatusOr<std::vector<std::string>> SqliteJobStore::ListUnusedBlobs(absl::Time before) {
  Query query = db_->Prepare("SELECT sha256 FROM blobs WHERE create_ms < ? AND sha256 NOT IN (SELECT sha256 FROM content_refs) LIMIT ?");
  query.Bind(absl::ToUnixMillis(before)).Bind(kUnusedPerSweep);
  std::vector<std::string> unused;
  while (true) {
    PPFT_ASSIGN_OR_RETURN(const bool row, query.Step());
    if (!row) return unused;
    unused.push_back(query.Text(0));
  }
}

absl::Status SqliteJobStore::AddRef(const std::string& owner, const std::string& sha256) {
  return db_->Prepare("INSERT OR IGNORE INTO content_refs (owner, sha256) VALUES (?, ?)").Bind(owner).Bind(sha256).Run();
}

absl::Status SqliteJobStore::DropRefs(const std::string& owner) { return db_->Prepare("DELETE FROM content_refs WHERE owner = ?").Bind(owner).Run(); }

absl::Status SqliteJobStore::DropRefsBelow(std::string prefix) {
  std::string end = prefix;
  end.back() = '0';  // the next character after '/'
  return db_->Prepare("DELETE FROM content_refs WHERE owner >= ? AND owner < ?").Bind(prefix).Bind(end).Run();
}

absl::Status SqliteJobStore::SetPreparedRefs(const v1::JobRecord& record) {
  if (!record.has_prepared()) return absl::OkStatus();
  const std::string owner = absl::StrCat("prepared/", record.job().id());
  PPFT_RETURN_IF_ERROR(AddRef(owner, record.prepared().train_tokens().sha256()));
  if (record.prepared().has_eval_tokens()) PPFT_RETURN_IF_ERROR(AddRef(owner, record.prepared().eval_tokens().sha256()));
  return absl::OkStatus();
}

}  // namespace ppft::coordinator
