#include "worker/agent/report_queue.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/logging.h"
#include "common/net/channel.h"

namespace ppft::agent {
namespace {

// With room for the envelope.
constexpr size_t kMaxReportBytes = net::kMaxMessageBytes - (64 << 10);

}  // namespace

void ReportQueue::Push(const v1::RankKey& rank, v1::TrainerReport report) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (report.has_log() && queue_.size() >= kLogLimit) return;
    v1::RankReport& entry = queue_.emplace_back();
    entry.set_seq(next_seq_++);
    *entry.mutable_rank() = rank;
    *entry.mutable_report() = std::move(report);
    if (const size_t bytes = entry.ByteSizeLong(); bytes > kMaxReportBytes)
      ReplaceBody(entry, absl::StrCat("it has ", bytes, " bytes, a message to the coordinator at most ", kMaxReportBytes));
  }
  on_push_();
}

void ReportQueue::Acknowledge(int64_t seq) {
  std::lock_guard<std::mutex> lock(mutex_);
  while (!queue_.empty() && queue_.front().seq() <= seq) queue_.pop_front();
}

int64_t ReportQueue::first() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty() ? 0 : queue_.front().seq();
}

void ReportQueue::Refuse(int64_t seq, const std::string& why) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (v1::RankReport& report : queue_) {
    if (report.seq() == seq) ReplaceBody(report, why);
  }
}

void ReportQueue::ReplaceBody(v1::RankReport& report, const std::string& why) {
  v1::TrainerReport& body = *report.mutable_report();
  const auto* field = v1::TrainerReport::descriptor()->FindFieldByNumber(body.report_case());
  const std::string kind = field == nullptr ? "empty" : field->name();
  const std::string text = absl::StrCat("a report (", kind, ") of rank ", report.rank().rank(), " cannot be sent: ", why);
  LogError(report.rank().job_id(), " epoch ", report.rank().epoch(), ": ", text);
  if (body.has_exited()) {
    body.mutable_exited()->set_detail(text);
  } else if (body.has_log() || body.has_trace()) {
    body.mutable_log()->set_source("agent");
    body.mutable_log()->set_severity("ERROR");
    body.mutable_log()->set_text(text);
  } else {
    v1::Failure& failure = *body.mutable_failure();
    failure.Clear();
    failure.set_peer(-1);
    failure.mutable_reason()->set_code("INTERNAL");
    failure.mutable_reason()->set_owner("INFRASTRUCTURE");
    failure.mutable_reason()->set_message(text);
    failure.mutable_reason()->set_remedy("this is a fault of ppft: see the logs of the worker and the coordinator, and whether both have the same version");
  }
}

std::vector<v1::RankReport> ReportQueue::After(int64_t after, size_t limit, size_t limit_bytes) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<v1::RankReport> out;
  if (queue_.empty()) return out;
  const int64_t first = queue_.front().seq();
  size_t bytes = 0;
  for (size_t i = after >= first ? static_cast<size_t>(after - first + 1) : 0; i < queue_.size() && out.size() < limit; ++i) {
    bytes += queue_[i].ByteSizeLong();
    if (!out.empty() && bytes > limit_bytes) break;
    out.push_back(queue_[i]);
  }
  return out;
}

bool ReportQueue::empty() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty();
}

}  // namespace ppft::agent
