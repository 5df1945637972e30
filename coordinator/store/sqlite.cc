#include "coordinator/store/sqlite.h"

#include <fcntl.h>
#include <sqlite3.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/status.h"

namespace ppft::coordinator {

Query::Query(Database* db, sqlite3_stmt* stmt, absl::Status prepared) : db_(db), stmt_(stmt), status_(std::move(prepared)) {}

Query::~Query() {
  if (stmt_ == nullptr) return;
  sqlite3_reset(stmt_);
  sqlite3_clear_bindings(stmt_);
}

Query& Query::Bind(int64_t value) {
  if (status_.ok()) {
    if (const int code = sqlite3_bind_int64(stmt_, next_++, value); code != SQLITE_OK) status_ = db_->Error(code, "bind");
  }
  return *this;
}

Query& Query::Bind(absl::string_view text) {
  if (status_.ok()) {
    const int code = sqlite3_bind_text64(stmt_, next_++, text.data() == nullptr ? "" : text.data(), text.size(), SQLITE_TRANSIENT, SQLITE_UTF8);
    if (code != SQLITE_OK) status_ = db_->Error(code, "bind");
  }
  return *this;
}

Query& Query::Bind(const Bytes& bytes) {
  if (status_.ok()) {
    const int code = sqlite3_bind_blob64(stmt_, next_++, bytes.value.data(), bytes.value.size(), SQLITE_TRANSIENT);
    if (code != SQLITE_OK) status_ = db_->Error(code, "bind");
  }
  return *this;
}

absl::StatusOr<bool> Query::Step() {
  if (!status_.ok()) return status_;
  const int code = sqlite3_step(stmt_);
  if (code == SQLITE_ROW) return true;
  if (code == SQLITE_DONE) return false;
  status_ = db_->Error(code, sqlite3_sql(stmt_));
  return status_;
}

absl::Status Query::Run() {
  while (true) {
    PPFT_ASSIGN_OR_RETURN(const bool row, Step());
    if (!row) return absl::OkStatus();
  }
}

int64_t Query::Int(int column) const { return sqlite3_column_int64(stmt_, column); }

std::string Query::Text(int column) const {
  const auto* data = static_cast<const char*>(sqlite3_column_blob(stmt_, column));
  const int size = sqlite3_column_bytes(stmt_, column);
  return data == nullptr ? std::string() : std::string(data, size);
}

absl::StatusOr<std::unique_ptr<Database>> Database::Open(const std::string& path, const std::string& data_dir) {
  // Created by us, so that the mode is right from the first moment; SQLite gives its companions the same mode.
  Fd file(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!file) {
    const absl::Status status = ErrnoStatus(errno, path);
    return absl::Status(status.code(), absl::StrCat("data_dir ", data_dir, " cannot be written: ", status.message(),
                                                    "; make it writable for this user or choose another --data_dir"));
  }
  file.reset();
  sqlite3* raw = nullptr;
  const int code = sqlite3_open_v2(path.c_str(), &raw, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE, nullptr);
  auto db = std::unique_ptr<Database>(new Database(raw));
  if (code != SQLITE_OK) return db->Error(code, absl::StrCat("data_dir ", data_dir, ": open ", path));
  sqlite3_busy_timeout(raw, 1000);
  sqlite3_db_config(raw, SQLITE_DBCONFIG_DEFENSIVE, 1, nullptr);
  absl::Status status = db->Execute(
      "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA trusted_schema=OFF; PRAGMA foreign_keys=ON; "
      "BEGIN EXCLUSIVE; COMMIT;");
  if (absl::IsUnavailable(status)) {
    return absl::FailedPreconditionError(
        absl::StrCat("data_dir ", data_dir, " is in use by another coordinator: stop that one first or choose another --data_dir"));
  }
  if (!status.ok()) return Annotate(status, absl::StrCat("data_dir ", data_dir));
  return db;
}

Database::~Database() {
  for (auto& [sql, stmt] : statements_) sqlite3_finalize(stmt);
  sqlite3_close(db_);
}

absl::Status Database::Execute(const std::string& sql) {
  const int code = sqlite3_exec(db_, sql.c_str(), nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : Error(code, sql);
}

Query Database::Prepare(const char* sql) {
  sqlite3_stmt*& stmt = statements_[sql];
  if (stmt == nullptr) {
    const int code = sqlite3_prepare_v3(db_, sql, -1, SQLITE_PREPARE_PERSISTENT, &stmt, nullptr);
    if (code != SQLITE_OK) return Query(this, nullptr, Error(code, sql));
  }
  return Query(this, stmt, absl::OkStatus());
}

int64_t Database::changes() const { return sqlite3_changes64(db_); }
int64_t Database::last_insert_rowid() const { return sqlite3_last_insert_rowid(db_); }

absl::Status Database::Error(int code, absl::string_view what) const {
  const std::string message = absl::StrCat("store: ", sqlite3_errmsg(db_), " (", what, ")");
  switch (code & 0xff) {
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return absl::UnavailableError(message);
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(message);
    case SQLITE_CONSTRAINT:
      return code == SQLITE_CONSTRAINT_TRIGGER ? absl::FailedPreconditionError(message) : absl::AlreadyExistsError(message);
    case SQLITE_READONLY:
    case SQLITE_PERM:
    case SQLITE_CANTOPEN:
      return absl::PermissionDeniedError(message);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return absl::DataLossError(message);
    default:
      return absl::InternalError(message);
  }
}

}  // namespace ppft::coordinator
