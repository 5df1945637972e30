// What this rank is doing now: each change of section writes a progress beat and adds the time of the section left to its kind.
//
// On a device a section lasts as long as the work that was queued in it: its changes are marks in the stream, and the times come when the device has been
// waited for anyway (Collect). While a trace runs, each section is recorded, too; otherwise that costs one comparison.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "common/pipeline/action.h"
#include "worker/trainer/beat.h"
#include "worker/trainer/cuda/device_timer.h"
#include "worker/trainer/engine/report.h"

namespace ppft::trainer {

enum class Busy { kForward = 0, kBackward, kOptimizer, kSend, kReceive, kIdle };
inline constexpr int kNumBusy = 6;
inline constexpr const char* kBusyNames[kNumBusy] = {"forward", "backward", "optimizer", "send", "recv", "idle"};

class Activity {
 public:
  // `beat` may be null.
  explicit Activity(Beat* beat);

  // All but Progress(), step() and seconds(): the engine's thread.

  // From here on sections are timed by the device. Once, with the device's stream current.
  void UseDevice(std::unique_ptr<DeviceTimer> timer);
  // `action`: what it is done for, if it is one of a program.
  void Enter(Section section, const pipeline::Action* action = nullptr);
  // A beat within the section: some of its work is done. Any thread.
  void Progress() { AddBeat(beat_); }
  // Nothing that counts as work, until the next section. No beat.
  void Rest() { Change(Section::kStarting, nullptr); }
  // The optimizer step that is being worked on.
  void SetStep(int64_t step) { step_.store(step, std::memory_order_relaxed); }
  // The sections belong to an evaluation.
  void SetEvaluation(bool evaluation) { evaluation_ = evaluation; }
  // Counts what the device has come to. Does not wait.
  void Collect();

  // Records from here on; waits for the device once, to set its times by the host's clock. Drops what was not taken.
  void StartTrace();
  // Ends it (waits for the device) and gives what was recorded, by begin.
  std::vector<TraceSpan> StopTrace();
  bool tracing() const { return tracing_; }
  bool on_device() const { return timer_ != nullptr; }
  // A span beside the sections, by the host's clock. Only while tracing.
  void AddSpan(TraceSpan span) { spans_.push_back(std::move(span)); }

  // Any thread. The section that has not been left yet is not in the seconds.
  int64_t step() const { return step_.load(std::memory_order_relaxed); }
  double seconds(Busy kind) const { return 1e-9 * static_cast<double>(nanoseconds_[static_cast<size_t>(kind)].load(std::memory_order_relaxed)); }

 private:
  // What goes on between two changes.
  struct Phase {
    Section section = Section::kStarting;
    std::optional<pipeline::Action> action;
    int64_t step = 0;
    bool evaluation = false;
    bool traced = false;
  };

  void Change(Section section, const pipeline::Action* action);
  void Close(int64_t end_nanos);

  Beat* const beat_;
  std::unique_ptr<DeviceTimer> timer_;  // null: the host's clock
  std::atomic<int64_t> step_{0};
  std::array<std::atomic<int64_t>, kNumBusy> nanoseconds_{};
  bool evaluation_ = false;
  Phase phase_;
  int64_t entered_nanos_ = 0;   // phase_'s begin, by the steady clock or since the device's first mark
  std::deque<Phase> upcoming_;  // whose marks the device has not reached, as far as Collect knows

  bool tracing_ = false;
  int64_t clock_nanos_ = 0;  // from entered_nanos_ to Unix time
  std::vector<TraceSpan> spans_;
};

int64_t UnixNanos();

}  // namespace ppft::trainer
