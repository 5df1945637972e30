// The socket to the agent: frames of a little-endian uint32 length and one message, both ways. A closed socket ends the process at once: nobody is left to
// work for.
#pragma once

#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/files.h"
#include "worker/trainer/engine/report.h"
#include "worker/trainer/wire.h"

namespace ppft::trainer {

class Control : public Reporter {
 public:
  explicit Control(Fd socket);

  // Blocks until the agent has said it. INVALID_ARGUMENT if it says something else.
  absl::StatusOr<TrainerConfig> AwaitStart();
  absl::StatusOr<std::vector<std::string>> AwaitPeers();
  // Names this rank in log lines.
  void SetSource(const std::string& source) { source_ = source; }
  // What the agent wants to be recorded.
  const TraceOrders& trace_orders() const { return trace_orders_; }

  void Listening(const std::string& address) override { Write(EncodeListening(address)); }
  void Ready() override { Write(EncodeReady()); }
  void Step(const StepReport& report) override { Write(Encode(report)); }
  void Eval(const EvalReport& report) override { Write(Encode(report)); }
  void Checkpoint(const CheckpointWritten& report) override { Write(Encode(report)); }
  void Stats(const StageStats& report) override { Write(Encode(report)); }
  void Finished(const TrainingState& state, const std::string& reason) override { Write(EncodeFinished(state, reason)); }
  void Exported(const ExportWritten& report) override { Write(Encode(report)); }
  void Trace(const RankTrace& trace) override { Write(Encode(trace)); }
  void Log(Severity severity, const std::string& text) override;
  void Failed(const FailureReport& report) override { Write(Encode(report)); }

 private:
  void ReadLoop();
  void Write(absl::string_view message);

  const Fd socket_;
  std::string source_ = "trainer";
  TraceOrders trace_orders_;
  std::mutex write_mutex_;  // one frame at a time

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<absl::StatusOr<TrainerConfig>> start_;             // guarded by mutex_
  std::optional<absl::StatusOr<std::vector<std::string>>> peers_;  // guarded by mutex_
};

}  // namespace ppft::trainer
