#include "common/pipeline/lowering.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/pipeline/channel.h"

namespace ppft::pipeline {
namespace {

absl::Status CheckComputeOnly(const std::vector<Program>& compute, int num_stages) {
  const int num_ranks = static_cast<int>(compute.size());
  for (int rank = 0; rank < num_ranks; ++rank) {
    for (const Action& action : compute[rank]) {
      if (!IsCompute(action.op))
        return absl::InvalidArgumentError(absl::StrCat("rank ", rank, ": ", ToString(action), " is a transfer; lowering inserts those"));
      if (action.stage < 0 || action.stage >= num_stages || action.stage % num_ranks != rank || action.microbatch < 0) {
        return absl::InvalidArgumentError(absl::StrCat("rank ", rank, ": ", ToString(action), " is no action of this rank"));
      }
    }
  }
  return absl::OkStatus();
}

struct Entry {
  int start = 0;
  int rank = 0;
  Action action;
};

// All actions by start time, one unit each; ties by rank.
absl::StatusOr<std::vector<Entry>> LinearOrder(const std::vector<Program>& compute, int num_stages) {
  const int num_ranks = static_cast<int>(compute.size());
  std::vector<Entry> order;
  int num_microbatches = 0;
  for (const Program& program : compute) {
    for (const Action& action : program) num_microbatches = std::max(num_microbatches, action.microbatch + 1);
  }
  const auto index = [&](int stage, Op op, int microbatch) {
    return (static_cast<size_t>(stage) * 2 + (op == Op::kBackward ? 1 : 0)) * num_microbatches + microbatch;
  };
  std::vector<int> end(static_cast<size_t>(num_stages) * 2 * num_microbatches, 0);  // 0: has not run
  std::vector<size_t> next(num_ranks, 0);
  std::vector<int> free_at(num_ranks, 0);
  bool moved = true;
  while (moved) {
    moved = false;
    for (int rank = 0; rank < num_ranks; ++rank) {
      for (; next[rank] < compute[rank].size(); ++next[rank]) {
        const Action& action = compute[rank][next[rank]];
        int start = free_at[rank];
        if (const std::optional<Action> receive = ReceiveBefore(action, num_stages)) {
          const int done = end[index(MatchingSend(*receive).stage, action.op, action.microbatch)];
          if (done == 0) break;
          start = std::max(start, done);
        }
        order.push_back({start, rank, action});
        free_at[rank] = end[index(action.stage, action.op, action.microbatch)] = start + 1;
        moved = true;
      }
    }
  }
  std::vector<std::string> waiting;
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (next[rank] < compute[rank].size()) waiting.push_back(absl::StrCat("rank ", rank, " waits at ", ToString(compute[rank][next[rank]])));
  }
  if (!waiting.empty()) return absl::FailedPreconditionError(absl::StrCat("the schedule cannot run: ", absl::StrJoin(waiting, ", ")));
  std::sort(order.begin(), order.end(), [](const Entry& a, const Entry& b) { return std::tie(a.start, a.rank) < std::tie(b.start, b.rank); });
  return order;
}

}  // namespace

absl::StatusOr<std::vector<Program>> Lower(const std::vector<Program>& compute, int num_stages) {
  if (absl::Status status = CheckComputeOnly(compute, num_stages); !status.ok()) return status;
  absl::StatusOr<std::vector<Entry>> order = LinearOrder(compute, num_stages);
  if (!order.ok()) return order.status();
  const int num_ranks = static_cast<int>(compute.size());
  std::vector<Program> programs(num_ranks);
  for (const Entry& entry : *order) {
    programs[entry.rank].push_back(entry.action);
    const std::optional<Action> send = SendAfter(entry.action, num_stages);
    if (!send || num_ranks == 1) continue;
    const Action receive = MatchingReceive(*send);
    programs[entry.rank].push_back(*send);
    programs[receive.stage % num_ranks].push_back(receive);
  }
  return programs;
}

}  // namespace ppft::pipeline
