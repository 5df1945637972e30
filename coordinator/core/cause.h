// Why an attempt failed: the first cause among what its ranks and the coordinator saw of it. PURE.
//
// One death makes many voices: the neighbours of a dead rank report broken links, their neighbours report them in turn, all exit. What a rank says of
// itself (NaN, out of memory, a device error, a hang, its own death by a signal) is nearer to the cause than what its neighbours say of it; of links the one
// counts whose lost end says nothing: a process that stands still cannot speak, and its neighbour names it.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "coordinator/core/retry.h"
#include "ppft/v1/plan.pb.h"

namespace ppft::coordinator {

class AttemptFailures {
 public:
  // In the order of arrival. An exit that its rank has explained before is not kept.
  void Add(Failure failure);
  bool empty() const { return failures_.empty(); }
  void Clear() { failures_.clear(); }
  // No later report can change the cause; false while only links and unexplained exits are known, which wait a moment for theirs.
  bool settled() const;
  // The cause as a sentence with rank, peer and worker, what followed from it folded under it. Not for an empty one. `unreachable`: workers without a
  // connection.
  Failure Cause(const v1::Plan& plan, const std::set<std::string>& unreachable) const;

 private:
  const Failure* OwnCause() const;
  const Failure* LastLink() const;
  const Failure* ExitOf(int32_t rank) const;
  bool FollowsALink(size_t index) const;

  std::vector<Failure> failures_;
};

}  // namespace ppft::coordinator
