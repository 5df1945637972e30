// Schedules: pure functions from (pipeline size p, stages per rank v, micro-batches m) to each pipeline rank's order of forwards and backwards.
// Sends and receives are inserted by lowering.h.
//
//   GPipe             arXiv 1811.06965  all forwards, then all backwards in the same order
//   1F1B              arXiv 2006.09503  p - rank - 1 forwards to warm up, then one forward and one backward in turn
//   interleaved 1F1B  arXiv 2104.04473  1F1B over v chunks per rank; micro-batches walk in groups, each group through all chunks
//
// The paper's interleaving wants m to be a multiple of p. Here the m micro-batches are cut into max(1, m / p) groups as equal as possible, so each
// has p to 2p - 1 of them (the paper's p when p divides m); for m >= p the bubble stays the ideal (p - 1) / (v m + p - 1).
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/pipeline/action.h"

namespace ppft::pipeline {

enum class ScheduleKind { kGPipe, k1F1B, kInterleaved1F1B };

std::string ToString(ScheduleKind kind);                                 // "gpipe", "1f1b", "interleaved_1f1b"
absl::StatusOr<ScheduleKind> ParseScheduleKind(absl::string_view text);  // INVALID_ARGUMENT names the three words

struct ScheduleShape {
  ScheduleKind kind = ScheduleKind::k1F1B;
  int pipeline_size = 1;     // p
  int virtual_stages = 1;    // v; 1 unless interleaved
  int num_microbatches = 1;  // m, per step and replica
};

// One program per pipeline rank, compute actions only. INVALID_ARGUMENT when a number is below 1, or v > 1 without interleaving.
absl::StatusOr<std::vector<Program>> BuildSchedule(const ScheduleShape& shape);

// All micro-batches forward through all stages and nothing else: evaluation. One program per pipeline rank, compute actions only.
absl::StatusOr<std::vector<Program>> BuildForwardOnly(int pipeline_size, int virtual_stages, int num_microbatches);

// Micro-batches below which the schedule leaves ranks without work in its steady phase: p for 1F1B and interleaved 1F1B, 1 for GPipe.
int MinMicrobatches(ScheduleKind kind, int pipeline_size);

}  // namespace ppft::pipeline
