// How ppctl writes numbers, times, tables and progress. Pure functions.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/proto_time.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/timestamp.pb.h"
#include "ppft/v1/cluster.pb.h"
#include "ppft/v1/dataset.pb.h"
#include "ppft/v1/job.pb.h"

namespace ppft::ctl {

std::string FormatCount(double value);                                                 // "12", "3.4k", "1.24B"
std::string ShortDuration(absl::Duration duration);                                    // "42s", "5m07s", "2h03m", "3d04h"
std::string FormatLoss(double value);                                                  // four significant digits
std::string FormatTime(const google::protobuf::Timestamp& time, absl::TimeZone zone);  // "2026-11-23 10:00:00"

// "140.4 GiB, compute capability 9.0, driver 580.65" or "4 threads, 15.6 GiB".
std::string HardwareText(const v1::Device& device);

// "RUNNING", without the enum's prefix.
std::string StateWord(v1::JobState state);
bool IsTerminal(v1::JobState state);

// Columns as wide as their widest cell, two blanks between; without trailing blanks. The first row is the heading.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);
// Number of terminal columns of UTF-8 text (one per character).
size_t DisplayWidth(absl::string_view text);

// "step 12/200  loss 3.412  lr 0.0002  1.2k tok/s  eta 2m05s"; brief: without the learning rate.
std::string StepText(const v1::JobStatus& status, bool brief = false);
// "NO_CAPACITY: needs 4 devices, 2 are there. Start more workers." — empty if there is no reason.
std::string ReasonText(const v1::Reason& reason);
// One plain line for where the job is now.
std::string StatusLine(const v1::Job& job);
// The same with a bar, at most `width` columns.
std::string BarLine(const v1::Job& job, size_t width);

// A preview row: supervised tokens in [[…]], or in colour.
std::string FormatPreviewRow(const v1::PreviewDatasetResponse::Row& row, bool color);

// Control characters other than newline and tab become visible escapes: text from elsewhere must not steer the terminal.
std::string Printable(absl::string_view text);

}  // namespace ppft::ctl
