// Between protobuf and plain values: proto/ppft/v1/trainer.proto on one side, engine/config.h and engine/report.h on the other. The one file of the trainer
// that sees protobuf; it never sees torch.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/trainer/engine/config.h"
#include "worker/trainer/engine/report.h"
#include "worker/trainer/engine/trace_orders.h"

namespace ppft::trainer {

// Exactly one is set.
struct AgentInput {
  std::optional<TrainerConfig> start;
  std::optional<std::vector<std::string>> peers;  // endpoints by rank
  std::optional<TraceOrder> trace;
};

// One serialized AgentMessage. INVALID_ARGUMENT if it is none, or if it lacks what every job has.
absl::StatusOr<AgentInput> ParseAgentMessage(absl::string_view bytes);

// Serialized TrainerReports.
std::string EncodeListening(const std::string& address);
std::string EncodeReady();
std::string Encode(const StepReport& report);
std::string Encode(const EvalReport& report);
std::string Encode(const CheckpointWritten& report);
std::string Encode(const StageStats& report);
std::string EncodeFinished(const TrainingState& state, const std::string& reason);
std::string Encode(const ExportWritten& report);
std::string EncodeLog(const std::string& source, Severity severity, const std::string& text);
std::string Encode(const RankTrace& trace);
std::string Encode(const FailureReport& report);

}  // namespace ppft::trainer
