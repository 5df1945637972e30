#include "worker/agent/report_queue.h"

#include <utility>

namespace ppft::agent {

void ReportQueue::Push(const v1::RankKey& rank, v1::TrainerReport report) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (report.has_log() && queue_.size() >= kLogLimit) return;
    v1::RankReport& entry = queue_.emplace_back();
    entry.set_seq(next_seq_++);
    *entry.mutable_rank() = rank;
    *entry.mutable_report() = std::move(report);
  }
  on_push_();
}

void ReportQueue::Acknowledge(int64_t seq) {
  std::lock_guard<std::mutex> lock(mutex_);
  while (!queue_.empty() && queue_.front().seq() <= seq) queue_.pop_front();
}

std::vector<v1::RankReport> ReportQueue::After(int64_t after, size_t limit) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<v1::RankReport> out;
  if (queue_.empty()) return out;
  const int64_t first = queue_.front().seq();
  for (size_t i = after >= first ? static_cast<size_t>(after - first + 1) : 0; i < queue_.size() && out.size() < limit; ++i) out.push_back(queue_[i]);
  return out;
}

bool ReportQueue::empty() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty();
}

}  // namespace ppft::agent
