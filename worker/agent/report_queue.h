// Reports that the coordinator has not acknowledged yet, in order. They survive a broken stream, not the agent: a new incarnation starts a new attempt.
//
// Thread: any.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "ppft/v1/worker.pb.h"

namespace ppft::agent {

class ReportQueue {
 public:
  // Called after every Push, outside the lock.
  explicit ReportQueue(std::function<void()> on_push) : on_push_(std::move(on_push)) {}

  // What one message cannot carry is refused at once.
  void Push(const v1::RankKey& rank, v1::TrainerReport report);
  // Reports up to `seq` are committed at the coordinator.
  void Acknowledge(int64_t seq);
  // Reports with seq > after, oldest first: at most `limit`, and no more than `limit_bytes` of them, but at least one.
  std::vector<v1::RankReport> After(int64_t after, size_t limit, size_t limit_bytes) const;
  // The oldest report that waits; 0 if none does.
  int64_t first() const;
  // The coordinator will never take this report. Its rank's failure stands in its place from now on; of a log line, a trace or an exit, that it is lacking.
  void Refuse(int64_t seq, const std::string& why);
  bool empty() const;

 private:
  // While the coordinator is away, log lines beyond this many waiting reports are dropped; other reports never are.
  static constexpr size_t kLogLimit = 20000;

  static void ReplaceBody(v1::RankReport& report, const std::string& why);

  const std::function<void()> on_push_;
  mutable std::mutex mutex_;
  int64_t next_seq_ = 1;              // guarded by mutex_
  std::deque<v1::RankReport> queue_;  // guarded by mutex_
};

}  // namespace ppft::agent
