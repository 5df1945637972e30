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

// Whether a device's memory ran out. Not where a reason is known already: a full disk has the same status code.
bool IsOutOfDeviceMemory(const absl::Status& status);

// A failure without a better reason is the device's: DEVICE_ERROR with `gpu` ("cuda:1, GPU-…") in its text, and where its driver has told more. Others, and
// all where `gpu` is empty, stay as they are.
absl::Status BlameGpu(const absl::Status& status, absl::string_view gpu);

// How a checkpoint's files were opened: what says that a file is bad is CHECKPOINT_CORRUPT, other errors are this host's own.
absl::Status OpenedCheckpoint(const absl::Status& status);
// How its tensors were read: a missing, misshapen or not finite one is CHECKPOINT_CORRUPT; errors of the device or its memory stay what they are.
absl::Status ReadCheckpoint(const absl::Status& status);

// A reason is made up from the status code where none was attached.
FailureReport DescribeFailure(const absl::Status& status, int64_t step);

}  // namespace ppft::trainer
