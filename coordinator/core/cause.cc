#include "coordinator/core/cause.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/core/job_state.h"

namespace ppft::coordinator {
namespace {

std::string WorkerOf(const v1::Plan& plan, int32_t rank) {
  for (const v1::RankPlan& one : plan.ranks()) {
    if (one.rank() == rank) return one.worker();
  }
  return "";
}

std::string Who(const v1::Plan& plan, int32_t rank) { return absl::StrCat("rank ", rank, " on ", WorkerOf(plan, rank)); }

bool IsLink(const Failure& failure) { return failure.weight == Failure::Weight::kBrokenLink; }

}  // namespace

void AttemptFailures::Add(Failure failure) {
  const bool explained = std::any_of(failures_.begin(), failures_.end(), [&](const Failure& other) { return other.rank == failure.rank && !other.exit; });
  if (failure.exit && explained) return;
  failures_.push_back(std::move(failure));
}

// A death by a signal that came after links broke to other ranks alone: it fell over what it lost.
bool AttemptFailures::FollowsALink(size_t index) const {
  const Failure& failure = failures_[index];
  if (!failure.exit) return false;
  bool before = false;
  for (size_t i = 0; i < failures_.size(); ++i) {
    if (!IsLink(failures_[i])) continue;
    if (failures_[i].peer < 0 || failures_[i].peer == failure.rank) return false;
    before = before || i < index;
  }
  return before;
}

const Failure* AttemptFailures::OwnCause() const {
  for (const Failure& failure : failures_) {
    if (failure.weight == Failure::Weight::kUserError) return &failure;
  }
  for (size_t i = 0; i < failures_.size(); ++i) {
    if (failures_[i].weight == Failure::Weight::kCause && !FollowsALink(i)) return &failures_[i];
  }
  return nullptr;
}

// From the first link on to the rank that was lost, to the one that this rank has lost, and so on.
const Failure* AttemptFailures::LastLink() const {
  const auto link_of = [this](int32_t rank) -> const Failure* {
    for (const Failure& failure : failures_) {
      if (IsLink(failure) && (rank < 0 || failure.rank == rank)) return &failure;
    }
    return nullptr;
  };
  const Failure* link = link_of(-1);
  std::set<int32_t> seen;
  while (link != nullptr && link->peer >= 0 && seen.insert(link->rank).second) {
    const Failure* next = link_of(link->peer);
    if (next == nullptr || seen.count(next->peer) > 0) break;  // two that lost each other: the first word counts
    link = next;
  }
  return link;
}

const Failure* AttemptFailures::ExitOf(int32_t rank) const {
  for (const Failure& failure : failures_) {
    if (failure.exit && (rank < 0 || failure.rank == rank)) return &failure;
  }
  return nullptr;
}

bool AttemptFailures::settled() const { return OwnCause() != nullptr; }

Failure AttemptFailures::Cause(const v1::Plan& plan, const std::set<std::string>& unreachable) const {
  const Failure* link = LastLink();
  const int32_t lost = link == nullptr ? -1 : link->peer;
  const Failure* chosen = OwnCause();
  if (chosen == nullptr && link != nullptr) chosen = ExitOf(lost);
  if (chosen == nullptr) chosen = link != nullptr ? link : &failures_.front();
  Failure cause = *chosen;
  const bool own = cause.weight >= Failure::Weight::kCause;
  if (!own && !unreachable.empty()) {
    for (const v1::RankPlan& rank : plan.ranks()) {
      if (unreachable.count(rank.worker()) == 0 || (lost >= 0 && rank.rank() != lost)) continue;
      cause = Failure{MakeReason("WORKER_LOST", absl::StrCat("the connection of worker ", rank.worker(), " broke")), cause.step};
      cause.rank = rank.rank();
      cause.worker = rank.worker();
      break;
    }
  }
  if (IsLink(cause) && cause.peer >= 0) {
    cause.worker = WorkerOf(plan, cause.peer);
    cause.reason.set_message(absl::StrCat(Who(plan, cause.rank), " lost ", Who(plan, cause.peer), ": ", cause.reason.message()));
  }
  if (cause.worker.empty() && cause.rank >= 0) cause.worker = WorkerOf(plan, cause.rank);
  if (IsLink(cause)) return cause;
  std::vector<std::string> lost_it;
  for (const Failure& failure : failures_) {
    if (IsLink(failure) && failure.peer == cause.rank && failure.peer >= 0 && failure.rank != cause.rank) lost_it.push_back(Who(plan, failure.rank));
  }
  if (!lost_it.empty()) cause.reason.set_message(absl::StrCat(cause.reason.message(), " (COMM_ERROR: lost by ", absl::StrJoin(lost_it, ", "), ")"));
  return cause;
}

}  // namespace ppft::coordinator
