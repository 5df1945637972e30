// A thin face of SQLite: one connection, prepared statements, Status. EDGE: with sqlite_job_store.cc the only place that touches SQLite.
// Thread: one at a time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

struct sqlite3;
struct sqlite3_stmt;

namespace ppft::coordinator {

class Database;

// A blob column or parameter; a plain string is text.
struct Bytes {
  std::string value;
};

// One execution of a cached statement: bind in order, Step until it says false, read columns by index from 0.
class Query {
 public:
  Query(Database* db, sqlite3_stmt* stmt, absl::Status prepared);
  Query(const Query&) = delete;
  Query& operator=(const Query&) = delete;
  ~Query();

  Query& Bind(int64_t value);
  Query& Bind(absl::string_view text);
  Query& Bind(const Bytes& bytes);

  absl::StatusOr<bool> Step();  // true: a row is there
  absl::Status Run();           // to the end, rows ignored
  int64_t Int(int column) const;
  std::string Text(int column) const;  // text or blob

 private:
  Database* const db_;
  sqlite3_stmt* const stmt_;
  absl::Status status_;
  int next_ = 1;
};

class Database {
 public:
  // Opens or creates `path` (mode 0600) and takes the exclusive lock. `data_dir` is named in errors. FAILED_PRECONDITION: another process
  // holds it; PERMISSION_DENIED: it cannot be written.
  static absl::StatusOr<std::unique_ptr<Database>> Open(const std::string& path, const std::string& data_dir);
  ~Database();

  absl::Status Execute(const std::string& sql);  // one or more statements without parameters or rows
  // `sql` must be a constant: its prepared form is kept. One execution at a time per text.
  Query Prepare(const char* sql);
  int64_t changes() const;
  int64_t last_insert_rowid() const;
  absl::Status Error(int code, absl::string_view what) const;

 private:
  explicit Database(sqlite3* db) : db_(db) {}
  sqlite3* const db_;
  std::map<const char*, sqlite3_stmt*> statements_;
};

}  // namespace ppft::coordinator
