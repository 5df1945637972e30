// About once a second, from a thread of its own, what a rank did with its time.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "worker/trainer/comm/transport.h"
#include "worker/trainer/engine/activity.h"
#include "worker/trainer/engine/report.h"
#include "worker/trainer/engine/trainer.h"

namespace ppft::trainer {

class Trainer::StatsThread {
 public:
  // All outlive this object; `transport` may be null. `device_bytes`: the peak on the device, 0 where the host's memory is the device.
  StatsThread(int pipeline_rank, const Activity* activity, const Transport* transport, Reporter* reporter, const std::atomic<int64_t>* device_bytes)
      : pipeline_rank_(pipeline_rank), activity_(activity), transport_(transport), reporter_(reporter), device_bytes_(device_bytes), thread_([this] {
          Loop();
        }) {}

  ~StatsThread() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

 private:
  void Loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    bool last = false;
    while (!last) {
      last = changed_.wait_for(lock, std::chrono::seconds(1), [this] { return stopping_; });
      lock.unlock();
      reporter_->Stats(Snapshot());
      lock.lock();
    }
  }

  StageStats Snapshot() {
    StageStats stats;
    stats.pipeline_rank = pipeline_rank_;
    double working = 0, counted = 0;
    for (int kind = 0; kind < kNumBusy; ++kind) {
      const double seconds = activity_->seconds(static_cast<Busy>(kind));
      stats.busy_seconds[kBusyNames[kind]] = seconds;
      counted += seconds;
      if (kind <= static_cast<int>(Busy::kOptimizer)) working += seconds;
    }
    if (transport_ != nullptr) {
      const TransferCounts counts = transport_->counts();
      stats.sent_bytes = counts.sent_bytes;
      stats.received_bytes = counts.received_bytes;
    }
    struct rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    const int64_t device_bytes = device_bytes_->load(std::memory_order_relaxed);
    stats.memory_bytes = device_bytes > 0 ? device_bytes : usage.ru_maxrss * int64_t{1024};
    // Of the time that is counted: a device's comes step by step.
    if (counted > last_counted_) bubble_ratio_ = std::clamp(1.0 - (working - last_working_) / (counted - last_counted_), 0.0, 1.0);
    last_counted_ = counted;
    last_working_ = working;
    stats.bubble_ratio = bubble_ratio_;
    return stats;
  }

  const int pipeline_rank_;
  const Activity* const activity_;
  const Transport* const transport_;
  Reporter* const reporter_;
  const std::atomic<int64_t>* const device_bytes_;
  double last_counted_ = 0;
  double last_working_ = 0;
  double bubble_ratio_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace ppft::trainer
