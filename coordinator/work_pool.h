// Threads for work that may block: one per piece of work up to a limit, kept for reuse.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"

namespace ppft::coordinator {

class WorkPool {
 public:
  explicit WorkPool(size_t max_threads) : max_threads_(max_threads) {}
  ~WorkPool() { Stop(); }

  // From any thread. After Stop the work is dropped.
  void Run(absl::AnyInvocable<void()> work);
  // Waits for the work under way; what has not begun is dropped.
  void Stop();

 private:
  void Loop();

  const size_t max_threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<absl::AnyInvocable<void()>> queue_;  // guarded by mutex_, like all below
  std::vector<std::thread> threads_;
  size_t idle_ = 0;
  bool stopping_ = false;
};

}  // namespace ppft::coordinator
