#include "common/pipeline/schedule.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace ppft::pipeline {
namespace {

absl::Status CheckShape(int pipeline_size, int virtual_stages, int num_microbatches) {
  if (pipeline_size < 1) return absl::InvalidArgumentError(absl::StrCat("pipeline_parallel_size (", pipeline_size, ") must be at least 1"));
  if (virtual_stages < 1) return absl::InvalidArgumentError(absl::StrCat("virtual_stages (", virtual_stages, ") must be at least 1"));
  if (num_microbatches < 1) return absl::InvalidArgumentError(absl::StrCat("num_microbatches (", num_microbatches, ") must be at least 1"));
  return absl::OkStatus();
}

// A chunk of a rank and a micro-batch; the stage is chunk * p + rank.
struct Unit {
  int chunk = 0;
  int microbatch = 0;
};

struct Groups {
  std::vector<int> sizes;
  int largest = 0;
};

Groups CutIntoGroups(int pipeline_size, int num_microbatches) {
  Groups groups;
  const int count = std::max(1, num_microbatches / pipeline_size);
  for (int i = 0; i < count; ++i) {
    groups.sizes.push_back(num_microbatches / count + (i < num_microbatches % count ? 1 : 0));
    groups.largest = std::max(groups.largest, groups.sizes.back());
  }
  return groups;
}

// The order in which every rank does its forwards; with `reverse_chunks` its backwards.
std::vector<Unit> UnitOrder(const Groups& groups, int virtual_stages, bool reverse_chunks) {
  std::vector<Unit> order;
  int first = 0;
  for (int size : groups.sizes) {
    for (int c = 0; c < virtual_stages; ++c) {
      const int chunk = reverse_chunks ? virtual_stages - 1 - c : c;
      for (int i = 0; i < size; ++i) order.push_back({chunk, first + i});
    }
    first += size;
  }
  return order;
}

// `warmup` forwards, then a forward and a backward in turn, then the backwards that are left.
Program OneForwardOneBackward(const std::vector<Unit>& forwards, const std::vector<Unit>& backwards, int warmup, int pipeline_size, int pipeline_rank) {
  Program program;
  const auto add = [&](Op op, const Unit& unit) { program.push_back({unit.chunk * pipeline_size + pipeline_rank, op, unit.microbatch}); };
  const int total = static_cast<int>(forwards.size());
  for (int i = 0; i < warmup; ++i) add(Op::kForward, forwards[i]);
  for (int i = warmup; i < total; ++i) {
    add(Op::kForward, forwards[i]);
    add(Op::kBackward, backwards[i - warmup]);
  }
  for (int i = total - warmup; i < total; ++i) add(Op::kBackward, backwards[i]);
  return program;
}

// Forwards before the first forward-backward pair.
int WarmupForwards(const ScheduleShape& shape, int largest_group, int pipeline_rank) {
  const int total = shape.virtual_stages * shape.num_microbatches;
  const int behind = shape.pipeline_size - pipeline_rank - 1;
  switch (shape.kind) {
    case ScheduleKind::kGPipe:
      return total;
    case ScheduleKind::k1F1B:
      return std::min(total, behind);
    case ScheduleKind::kInterleaved1F1B:
      return std::min(total, 2 * behind + (shape.virtual_stages - 1) * largest_group);
  }
  return total;
}

}  // namespace

std::string ToString(ScheduleKind kind) {
  switch (kind) {
    case ScheduleKind::kGPipe:
      return "gpipe";
    case ScheduleKind::k1F1B:
      return "1f1b";
    case ScheduleKind::kInterleaved1F1B:
      return "interleaved_1f1b";
  }
  return "";
}

absl::StatusOr<ScheduleKind> ParseScheduleKind(absl::string_view text) {
  for (ScheduleKind kind : {ScheduleKind::kGPipe, ScheduleKind::k1F1B, ScheduleKind::kInterleaved1F1B}) {
    if (text == ToString(kind)) return kind;
  }
  return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is no schedule: expected gpipe, 1f1b or interleaved_1f1b"));
}

absl::StatusOr<std::vector<Program>> BuildSchedule(const ScheduleShape& shape) {
  if (absl::Status status = CheckShape(shape.pipeline_size, shape.virtual_stages, shape.num_microbatches); !status.ok()) return status;
  const bool interleaved = shape.kind == ScheduleKind::kInterleaved1F1B;
  if (!interleaved && shape.virtual_stages != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("virtual_stages (", shape.virtual_stages, ") above 1 needs schedule interleaved_1f1b, not ", ToString(shape.kind)));
  }
  // Without chunks the groups do not matter: every order is 0 .. m - 1.
  const Groups groups = CutIntoGroups(shape.pipeline_size, shape.num_microbatches);
  const std::vector<Unit> forwards = UnitOrder(groups, shape.virtual_stages, false);
  const std::vector<Unit> backwards = UnitOrder(groups, shape.virtual_stages, true);
  std::vector<Program> programs;
  for (int rank = 0; rank < shape.pipeline_size; ++rank) {
    programs.push_back(OneForwardOneBackward(forwards, backwards, WarmupForwards(shape, groups.largest, rank), shape.pipeline_size, rank));
  }
  return programs;
}

absl::StatusOr<std::vector<Program>> BuildForwardOnly(int pipeline_size, int virtual_stages, int num_microbatches) {
  if (absl::Status status = CheckShape(pipeline_size, virtual_stages, num_microbatches); !status.ok()) return status;
  const std::vector<Unit> order = UnitOrder(CutIntoGroups(pipeline_size, num_microbatches), virtual_stages, false);
  std::vector<Program> programs(pipeline_size);
  for (int rank = 0; rank < pipeline_size; ++rank) {
    for (const Unit& unit : order) programs[rank].push_back({unit.chunk * pipeline_size + rank, Op::kForward, unit.microbatch});
  }
  return programs;
}

int MinMicrobatches(ScheduleKind kind, int pipeline_size) { return kind == ScheduleKind::kGPipe ? 1 : pipeline_size; }

}  // namespace ppft::pipeline
