// The numbered steps from an empty file to today's tables.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/store/sqlite.h"

namespace ppft::coordinator {

// migrations[i] takes user_version i to i + 1. Never change one that was released: add the next.
const std::vector<std::string>& Migrations();

// Runs what is missing, each in one transaction with its user_version. FAILED_PRECONDITION if the file is of a newer version of the program.
absl::Status Migrate(Database& db, const std::vector<std::string>& migrations);

}  // namespace ppft::coordinator
