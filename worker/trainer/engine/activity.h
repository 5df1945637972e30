// What this rank is doing now: each change of section writes a progress beat and adds the time of the section left to its kind.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "worker/trainer/beat.h"

namespace ppft::trainer {

enum class Busy { kForward = 0, kBackward, kOptimizer, kSend, kReceive, kIdle };
inline constexpr int kNumBusy = 6;
inline constexpr const char* kBusyNames[kNumBusy] = {"forward", "backward", "optimizer", "send", "recv", "idle"};

class Activity {
 public:
  // `beat` may be null.
  explicit Activity(Beat* beat) : beat_(beat), entered_(Clock::now()) {}

  // The engine's thread. `microbatch` -1: none.
  void Enter(Section section, int64_t microbatch = -1) {
    const Clock::time_point now = Clock::now();
    nanoseconds_[static_cast<size_t>(KindOf(section_))].fetch_add(std::chrono::nanoseconds(now - entered_).count(), std::memory_order_relaxed);
    section_ = section;
    entered_ = now;
    WriteBeat(beat_, section, step_.load(std::memory_order_relaxed), microbatch);
  }
  // The optimizer step that is being worked on.
  void SetStep(int64_t step) { step_.store(step, std::memory_order_relaxed); }

  // Any thread. The section that has not been left yet is not in the seconds.
  int64_t step() const { return step_.load(std::memory_order_relaxed); }
  double seconds(Busy kind) const { return 1e-9 * static_cast<double>(nanoseconds_[static_cast<size_t>(kind)].load(std::memory_order_relaxed)); }

 private:
  using Clock = std::chrono::steady_clock;

  static Busy KindOf(Section section) {
    switch (section) {
      case Section::kForward:
        return Busy::kForward;
      case Section::kBackward:
        return Busy::kBackward;
      case Section::kOptimizer:
        return Busy::kOptimizer;
      case Section::kSend:
        return Busy::kSend;
      case Section::kReceive:
      case Section::kReduce:
        return Busy::kReceive;
      default:
        return Busy::kIdle;
    }
  }

  Beat* const beat_;
  std::atomic<int64_t> step_{0};
  std::array<std::atomic<int64_t>, kNumBusy> nanoseconds_{};
  Section section_ = Section::kStarting;
  Clock::time_point entered_;
};

}  // namespace ppft::trainer
