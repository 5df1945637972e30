// A Status that knows its reason code, and the report that it becomes. The codes are those of the product's reason table.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "worker/trainer/engine/report.h"

namespace ppft::trainer {

// The same status with a code ("NUMERIC_DIVERGENCE"), its owner (USER, INFRASTRUCTURE, OPERATOR) and what to do. OK stays OK; a reason already there is
// kept: the first cause counts.
absl::Status WithReason(absl::Status status, absl::string_view code, absl::string_view owner, absl::string_view remedy);

// A reason is made up from the status code where none was attached.
FailureReport DescribeFailure(const absl::Status& status, int64_t step);

}  // namespace ppft::trainer
