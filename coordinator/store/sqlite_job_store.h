// JobStore on SQLite: one file, ppft.db in the data folder; WAL, synchronous=FULL, STRICT tables, an exclusive lock while it is open.
//
// Thread: one at a time; in the coordinator the controller's alone. Calls block on the disk.
#pragma once

#include <memory>
#include <string>

#include "coordinator/store/job_store.h"

namespace ppft::coordinator {

// The file's name in the data folder.
inline constexpr char kStoreFile[] = "ppft.db";

// Opens data_dir/ppft.db, makes it if missing, and migrates it. Errors name data_dir: FAILED_PRECONDITION in use by another coordinator or of
// a newer format, PERMISSION_DENIED not writable, DATA_LOSS damaged.
absl::StatusOr<std::unique_ptr<JobStore>> OpenSqliteJobStore(const std::string& data_dir);

}  // namespace ppft::coordinator
