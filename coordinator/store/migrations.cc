#include "coordinator/store/migrations.h"

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::coordinator {

const std::vector<std::string>& Migrations() {
  // Job states are the numbers of JobState; 6, 10 and 11 are terminal.
  static const auto* const migrations = new std::vector<std::string>{R"sql(
CREATE TABLE jobs (
  id TEXT PRIMARY KEY NOT NULL,
  request_id TEXT NOT NULL UNIQUE,
  name TEXT NOT NULL,
  state INTEGER NOT NULL CHECK (state BETWEEN 1 AND 12),
  epoch INTEGER NOT NULL CHECK (epoch >= 1),
  priority INTEGER NOT NULL,
  submit_order INTEGER NOT NULL UNIQUE,
  seq INTEGER NOT NULL,
  head BLOB NOT NULL,
  spec BLOB NOT NULL,
  record BLOB NOT NULL
) STRICT;
CREATE INDEX jobs_by_name ON jobs (name);
CREATE TRIGGER jobs_terminal_states_absorb BEFORE UPDATE OF state ON jobs
  WHEN OLD.state IN (6, 10, 11) AND NEW.state <> OLD.state
  BEGIN SELECT RAISE(ABORT, 'a terminal job does not move'); END;
CREATE TRIGGER jobs_epoch_grows BEFORE UPDATE OF epoch ON jobs
  WHEN NEW.epoch < OLD.epoch
  BEGIN SELECT RAISE(ABORT, 'an epoch never goes back'); END;

CREATE TABLE starts (
  number INTEGER PRIMARY KEY AUTOINCREMENT
) STRICT;

CREATE TABLE requests (
  method TEXT NOT NULL,
  request_id TEXT NOT NULL,
  payload_sha256 TEXT NOT NULL,
  resource_id TEXT NOT NULL,
  PRIMARY KEY (method, request_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  job_id TEXT NOT NULL REFERENCES jobs (id),
  event BLOB NOT NULL
) STRICT;
CREATE INDEX events_by_job ON events (job_id, seq);
CREATE TRIGGER events_do_not_change BEFORE UPDATE ON events
  BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_are_not_deleted BEFORE DELETE ON events
  BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;

CREATE TABLE logs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  job_id TEXT NOT NULL REFERENCES jobs (id),
  line BLOB NOT NULL
) STRICT;
CREATE INDEX logs_by_job ON logs (job_id, seq);

CREATE TABLE metrics (
  job_id TEXT NOT NULL REFERENCES jobs (id),
  step INTEGER NOT NULL,
  kind INTEGER NOT NULL CHECK (kind IN (0, 1)),
  row BLOB NOT NULL,
  PRIMARY KEY (job_id, step, kind)
) STRICT, WITHOUT ROWID;

CREATE TABLE checkpoints (
  job_id TEXT NOT NULL REFERENCES jobs (id),
  step INTEGER NOT NULL,
  epoch INTEGER NOT NULL,
  manifest BLOB NOT NULL,
  PRIMARY KEY (job_id, step)
) STRICT, WITHOUT ROWID;

CREATE TABLE rank_reports (
  job_id TEXT NOT NULL REFERENCES jobs (id),
  epoch INTEGER NOT NULL,
  kind INTEGER NOT NULL,
  step INTEGER NOT NULL,
  rank INTEGER NOT NULL,
  report BLOB NOT NULL,
  PRIMARY KEY (job_id, epoch, kind, step, rank)
) STRICT, WITHOUT ROWID;

CREATE TABLE workers (
  name TEXT PRIMARY KEY NOT NULL,
  incarnation TEXT NOT NULL,
  acked_seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE blobs (
  sha256 TEXT PRIMARY KEY NOT NULL,
  size_bytes INTEGER NOT NULL,
  create_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE content_refs (
  owner TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  PRIMARY KEY (owner, sha256)
) STRICT, WITHOUT ROWID;
CREATE INDEX content_refs_by_content ON content_refs (sha256);

CREATE TABLE datasets (
  id TEXT PRIMARY KEY NOT NULL,
  name TEXT NOT NULL,
  dataset BLOB NOT NULL
) STRICT;
CREATE INDEX datasets_by_name ON datasets (name);

CREATE TABLE models (
  name TEXT PRIMARY KEY NOT NULL,
  model BLOB NOT NULL,
  record BLOB NOT NULL
) STRICT;

CREATE TABLE artifacts (
  id TEXT NOT NULL,
  type TEXT NOT NULL,
  job_id TEXT NOT NULL,
  manifest BLOB NOT NULL,
  PRIMARY KEY (id, type)
) STRICT, WITHOUT ROWID;
CREATE INDEX artifacts_by_job ON artifacts (job_id);
)sql",
                                                                     R"sql(
ALTER TABLE workers ADD COLUMN num_gpus INTEGER NOT NULL DEFAULT 0;
ALTER TABLE workers ADD COLUMN gpus_away_ms INTEGER NOT NULL DEFAULT 0;
)sql"};
  return *migrations;
}

absl::Status Migrate(Database& db, const std::vector<std::string>& migrations) {
  int64_t version = 0;
  {
    Query query = db.Prepare("PRAGMA user_version");
    PPFT_RETURN_IF_ERROR(query.Step().status());
    version = query.Int(0);
  }
  if (version > static_cast<int64_t>(migrations.size())) {
    return absl::FailedPreconditionError(absl::StrCat("the store is of format ", version, ", this program knows ", migrations.size(),
                                                      ": start a version at least as new as the one that wrote it"));
  }
  for (; version < static_cast<int64_t>(migrations.size()); ++version) {
    PPFT_RETURN_IF_ERROR(db.Execute("BEGIN EXCLUSIVE"));
    absl::Status status = db.Execute(migrations[version]);
    if (status.ok()) status = db.Execute(absl::StrCat("PRAGMA user_version=", version + 1));
    if (status.ok()) status = db.Execute("COMMIT");
    if (!status.ok()) {
      db.Execute("ROLLBACK").IgnoreError();  // the error that matters is the first
      return Annotate(status, absl::StrCat("migration to format ", version + 1));
    }
  }
  return absl::OkStatus();
}

}  // namespace ppft::coordinator
