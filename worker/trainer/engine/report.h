// What a trainer tells its agent, as plain values: TrainerReport of proto/ppft/v1/trainer.proto.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/base/logging.h"
#include "worker/trainer/engine/config.h"

namespace ppft::trainer {

struct MetricRow {
  int64_t step = 0;
  double epoch = 0;
  std::optional<double> loss;
  std::optional<double> learning_rate;
  std::optional<double> grad_norm;
  std::optional<double> eval_loss;
  double tokens_per_second = 0;
  double loss_scale = 1;
  bool skipped = false;
};

struct SkippedStep {
  int64_t step = 0;
  std::string reason;
  double loss_scale = 1;  // of the step
  double next_loss_scale = 1;
};

struct StepReport {
  MetricRow row;
  std::vector<SkippedStep> skipped;  // since the last report
  int64_t tokens_seen = 0;
  int64_t supervised_tokens = 0;
  int64_t skipped_steps = 0;
  double seconds = 0;
};

struct EvalReport {
  MetricRow row;
  bool best = false;
  std::optional<double> best_metric;
  int64_t best_step = 0;
  double seconds = 0;
};

struct CheckpointWritten {
  TrainingState state;
  std::vector<FileOnDisk> files;
  bool best = false;
  std::optional<double> eval_loss;
};

struct StageStats {
  std::map<std::string, double> busy_seconds;
  int64_t sent_bytes = 0;
  int64_t received_bytes = 0;
  int64_t memory_bytes = 0;
  int pipeline_rank = 0;
  double bubble_ratio = 0;
};

struct Verification {
  std::string type;  // adapter | merged
  double max_relative_difference = 0;
  double max_absolute_difference = 0;
  std::vector<int32_t> probe_ids;
  std::vector<int32_t> logit_ids;
  std::vector<float> last_logits;  // of logit_ids
};

struct ExportWritten {
  int64_t step = 0;
  std::vector<FileOnDisk> adapter_files;
  std::vector<FileOnDisk> merged_files;
  std::vector<Verification> verifications;
};

enum class TraceRow { kCompute, kSend, kReceive, kCollective, kOptimizer, kEvaluation, kCheckpoint };

struct TraceSpan {
  TraceRow row = TraceRow::kCompute;
  std::string name;  // the action, or what was done
  int64_t step = 0;
  int stage = -1;
  int microbatch = -1;
  int64_t begin_unix_nanos = 0;
  int64_t duration_nanos = 0;
  bool evaluation = false;  // part of an evaluation, not of a step
};

struct RankTrace {
  int64_t id = 0;
  int64_t first_step = 0;  // 0: no step was left to record
  int64_t last_step = 0;
  bool device_times = false;
  std::vector<TraceSpan> spans;
  bool last = false;  // of this trace
};

struct FailureReport {
  std::string code;
  std::string owner;
  std::string message;
  std::string remedy;
  int64_t step = 0;
  int peer = -1;
};

// Any thread; one report at a time leaves the process whole.
class Reporter {
 public:
  virtual ~Reporter() = default;
  virtual void Listening(const std::string& address) = 0;
  virtual void Ready() = 0;
  virtual void Step(const StepReport& report) = 0;
  virtual void Eval(const EvalReport& report) = 0;
  virtual void Checkpoint(const CheckpointWritten& report) = 0;
  virtual void Stats(const StageStats& report) = 0;
  virtual void Finished(const TrainingState& state, const std::string& reason) = 0;
  virtual void Exported(const ExportWritten& report) = 0;
  virtual void Trace(const RankTrace& trace) = 0;
  virtual void Log(Severity severity, const std::string& text) = 0;
  virtual void Failed(const FailureReport& report) = 0;
};

}  // namespace ppft::trainer
