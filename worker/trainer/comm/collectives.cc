#include "worker/trainer/comm/collectives.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/base/status.h"

namespace ppft::trainer {
namespace {

// A copy, so that the caller may change its memory while the message is under way.
template <typename T>
Buffer CopyOf(const T* data, int64_t count) {
  auto owner = std::make_shared<std::vector<T>>(data, data + count);
  Buffer buffer;
  buffer.data = owner->data();
  buffer.bytes = count * static_cast<int64_t>(sizeof(T));
  buffer.owner = owner;
  return buffer;
}

template <typename T>
Buffer ViewOf(T* data, int64_t count) {
  Buffer buffer;
  buffer.data = data;
  buffer.bytes = count * static_cast<int64_t>(sizeof(T));
  return buffer;
}

}  // namespace

Group::Group(Transport* transport, int id, std::vector<int> members) : transport_(transport), id_(id), members_(std::move(members)) {
  for (size_t i = 0; i < members_.size(); ++i) {
    if (transport_ == nullptr || members_[i] == transport_->rank()) index_ = static_cast<int>(i);
  }
}

absl::StatusOr<std::vector<double>> Group::AllGather(absl::Span<const double> values, const std::vector<int64_t>& counts) {
  std::vector<int64_t> begin(counts.size() + 1, 0);
  for (size_t i = 0; i < counts.size(); ++i) begin[i + 1] = begin[i] + counts[i];
  if (counts.size() != members_.size() || static_cast<int64_t>(values.size()) != counts[static_cast<size_t>(index_)]) {
    return absl::InternalError("all-gather: the counts do not fit the group");
  }
  auto all = std::make_shared<std::vector<double>>(static_cast<size_t>(begin.back()));
  std::copy(values.begin(), values.end(), all->begin() + begin[static_cast<size_t>(index_)]);
  const Tag tag = NextTag();
  std::vector<Ticket> tickets;
  for (size_t i = 0; i < members_.size(); ++i) {
    if (static_cast<int>(i) == index_ || counts[i] == 0) continue;
    Buffer buffer = ViewOf(all->data() + begin[i], counts[i]);
    buffer.owner = all;
    PPFT_ASSIGN_OR_RETURN(const Ticket ticket, transport_->PostReceive(members_[i], Channel::kControl, tag, std::move(buffer)));
    tickets.push_back(ticket);
  }
  for (size_t i = 0; i < members_.size() && !values.empty(); ++i) {
    if (static_cast<int>(i) == index_) continue;
    PPFT_RETURN_IF_ERROR(transport_->Send(members_[i], Channel::kControl, tag, CopyOf(values.data(), static_cast<int64_t>(values.size()))));
  }
  for (const Ticket ticket : tickets) PPFT_RETURN_IF_ERROR(transport_->Wait(ticket));
  return *all;
}

absl::Status Group::AllReduceSum(absl::Span<double> values) {
  PPFT_ASSIGN_OR_RETURN(const std::vector<double> all, AllGather(values, std::vector<int64_t>(members_.size(), static_cast<int64_t>(values.size()))));
  for (size_t k = 0; k < values.size(); ++k) {
    double sum = 0;
    for (size_t i = 0; i < members_.size(); ++i) sum += all[i * values.size() + k];
    values[k] = sum;
  }
  return absl::OkStatus();
}

absl::Status Group::Barrier() {
  double nothing = 0;
  return AllReduceSum(absl::Span<double>(&nothing, 1));
}

std::vector<int64_t> Group::EvenBounds(int64_t count) const {
  std::vector<int64_t> bounds(members_.size() + 1);
  for (size_t i = 0; i <= members_.size(); ++i) bounds[i] = count * static_cast<int64_t>(i) / static_cast<int64_t>(members_.size());
  return bounds;
}

absl::StatusOr<Group::Gathering> Group::BeginAllGather(Buffer own, char* whole) {
  Gathering gathering;
  const Tag tag = NextTag();
  for (size_t i = 0; i < members_.size() && own.bytes > 0; ++i) {
    if (static_cast<int>(i) == index_) continue;
    PPFT_ASSIGN_OR_RETURN(const Ticket ticket,
                          transport_->PostReceive(members_[i], Channel::kControl, tag, ViewOf(whole + static_cast<int64_t>(i) * own.bytes, own.bytes)));
    gathering.tickets.push_back(ticket);
  }
  for (size_t i = 0; i < members_.size() && own.bytes > 0; ++i) {
    if (static_cast<int>(i) != index_) PPFT_RETURN_IF_ERROR(transport_->Send(members_[i], Channel::kControl, tag, own));
  }
  return gathering;
}

absl::Status Group::End(const Gathering& gathering) {
  for (const Ticket ticket : gathering.tickets) PPFT_RETURN_IF_ERROR(transport_->Wait(ticket));
  return absl::OkStatus();
}

absl::StatusOr<Group::Summing> Group::BeginReduceScatter(absl::Span<const float> values, const std::vector<int64_t>& bounds) {
  Summing summing;
  const Tag tag = NextTag();
  const auto me = static_cast<size_t>(index_);
  const int64_t mine = bounds[me + 1] - bounds[me];
  for (size_t i = 0; i < members_.size(); ++i) {
    const float* const own = values.data() + bounds[me];
    summing.parts.push_back(i == me ? std::make_shared<std::vector<float>>(own, own + mine) : std::make_shared<std::vector<float>>(static_cast<size_t>(mine)));
    if (i == me || mine == 0) continue;
    Buffer buffer = ViewOf(summing.parts[i]->data(), mine);
    buffer.owner = summing.parts[i];
    PPFT_ASSIGN_OR_RETURN(const Ticket ticket, transport_->PostReceive(members_[i], Channel::kControl, tag, std::move(buffer)));
    summing.tickets.push_back(ticket);
  }
  for (size_t i = 0; i < members_.size(); ++i) {
    const int64_t count = bounds[i + 1] - bounds[i];
    if (i == me || count == 0) continue;
    PPFT_RETURN_IF_ERROR(transport_->Send(members_[i], Channel::kControl, tag, CopyOf(values.data() + bounds[i], count)));
  }
  return summing;
}

absl::Status Group::End(const Summing& summing, absl::Span<float> sum) {
  for (const Ticket ticket : summing.tickets) PPFT_RETURN_IF_ERROR(transport_->Wait(ticket));
  for (size_t k = 0; k < sum.size(); ++k) {
    float total = (*summing.parts[0])[k];
    for (size_t i = 1; i < summing.parts.size(); ++i) total += (*summing.parts[i])[k];
    sum[k] = total;
  }
  return absl::OkStatus();
}

absl::Status Group::ReduceScatter(absl::Span<float> values, const std::vector<int64_t>& bounds) {
  if (size() == 1) return absl::OkStatus();
  PPFT_ASSIGN_OR_RETURN(const Summing summing, BeginReduceScatter(values, bounds));
  const auto me = static_cast<size_t>(index_);
  return End(summing, values.subspan(static_cast<size_t>(bounds[me]), static_cast<size_t>(bounds[me + 1] - bounds[me])));
}

absl::Status Group::AllGather(absl::Span<float> values, const std::vector<int64_t>& bounds) {
  if (size() == 1) return absl::OkStatus();
  const Tag tag = NextTag();
  const auto me = static_cast<size_t>(index_);
  std::vector<Ticket> tickets;
  for (size_t i = 0; i < members_.size(); ++i) {
    const int64_t count = bounds[i + 1] - bounds[i];
    if (i == me || count == 0) continue;
    PPFT_ASSIGN_OR_RETURN(const Ticket ticket, transport_->PostReceive(members_[i], Channel::kControl, tag, ViewOf(values.data() + bounds[i], count)));
    tickets.push_back(ticket);
  }
  const int64_t mine = bounds[me + 1] - bounds[me];
  if (mine > 0) {
    const Buffer copy = CopyOf(values.data() + bounds[me], mine);
    for (size_t i = 0; i < members_.size(); ++i) {
      if (i != me) PPFT_RETURN_IF_ERROR(transport_->Send(members_[i], Channel::kControl, tag, copy));
    }
  }
  for (const Ticket ticket : tickets) PPFT_RETURN_IF_ERROR(transport_->Wait(ticket));
  return absl::OkStatus();
}

absl::Status Group::AllReduceSum(absl::Span<float> values) {
  const std::vector<int64_t> bounds = EvenBounds(static_cast<int64_t>(values.size()));
  PPFT_RETURN_IF_ERROR(ReduceScatter(values, bounds));
  return AllGather(values, bounds);
}

}  // namespace ppft::trainer
