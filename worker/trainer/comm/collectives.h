// Operations of a group of ranks over a Transport, on its control channel. Sums are formed in the group's order, so every rank gets the same bits, run
// after run. All members call the same operations in the same order.
//
// Thread: the transport's, one at a time; what is not begun blocks until its messages have come. Errors: the transport's; after one the group is spent.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/trainer/comm/transport.h"

namespace ppft::trainer {

class Group {
 public:
  // `members` are ranks in the group's order, this rank among them. `id` sets the group's messages apart from those of other groups of the transport.
  Group(Transport* transport, int id, std::vector<int> members);

  int size() const { return static_cast<int>(members_.size()); }
  int index() const { return index_; }
  const std::vector<int>& members() const { return members_; }

  // The concatenation of all members' values. counts[i] is the number of member i's.
  absl::StatusOr<std::vector<double>> AllGather(absl::Span<const double> values, const std::vector<int64_t>& counts);
  // In place.
  absl::Status AllReduceSum(absl::Span<double> values);
  absl::Status Barrier();

  // The same with computation in between. What is begun is ended in that order; several may be under way.
  struct Gathering {
    std::vector<Ticket> tickets;
  };
  struct Summing {
    std::vector<Ticket> tickets;
    std::vector<std::shared_ptr<std::vector<float>>> parts;  // by member: its share of what this one owns
  };
  // Member i's `bytes` go to whole + i * bytes of all others. `own` must not change before it has left: its owner keeps it.
  absl::StatusOr<Gathering> BeginAllGather(Buffer own, char* whole);
  absl::Status End(const Gathering& gathering);
  // `values` may change at once.
  absl::StatusOr<Summing> BeginReduceScatter(absl::Span<const float> values, const std::vector<int64_t>& bounds);
  // sum[k] = the k-th owned element, summed in the group's order.
  absl::Status End(const Summing& summing, absl::Span<float> sum);

  // fp32 elements. Member i owns [bounds[i], bounds[i + 1]) of them.
  // After it, the owned part holds the sum over all members; the rest is unspecified.
  absl::Status ReduceScatter(absl::Span<float> values, const std::vector<int64_t>& bounds);
  // Each member's part goes to all.
  absl::Status AllGather(absl::Span<float> values, const std::vector<int64_t>& bounds);
  // ReduceScatter and AllGather.
  absl::Status AllReduceSum(absl::Span<float> values);

  // [0, size) cut into size() parts that differ by at most one element.
  std::vector<int64_t> EvenBounds(int64_t size) const;

 private:
  Tag NextTag() { return {next_pass_++, id_, 0}; }

  Transport* const transport_;
  const int id_;
  const std::vector<int> members_;
  int index_ = 0;
  int64_t next_pass_ = 0;
};

}  // namespace ppft::trainer
