// What the agent wants to be recorded: proto/ppft/v1/trace.proto.
#pragma once

#include <cstdint>
#include <mutex>

namespace ppft::trainer {

struct TraceOrder {
  int64_t id = 0;  // 0: none
  int64_t num_steps = 0;
};

// The newest order. Any thread.
class TraceOrders {
 public:
  void Set(const TraceOrder& order) {
    std::lock_guard<std::mutex> lock(mutex_);
    newest_ = order;
  }
  TraceOrder Get() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return newest_;
  }

 private:
  mutable std::mutex mutex_;
  TraceOrder newest_;  // guarded by mutex_
};

}  // namespace ppft::trainer
