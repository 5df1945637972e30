// How reports change what a job shows of itself. PURE.
#pragma once

#include <optional>
#include <vector>

#include "ppft/v1/checkpoint.pb.h"
#include "ppft/v1/job.pb.h"
#include "ppft/v1/plan.pb.h"
#include "ppft/v1/trainer.pb.h"

namespace ppft::coordinator {

void ApplyStep(v1::JobStatus& status, const v1::StepReport& report);
void ApplyEval(v1::JobStatus& status, const v1::EvalReport& report);

// Why a step changed no parameter, and what became of the loss scale: a sentence for the job's events.
std::string SkippedText(const v1::SkippedStep& skipped);

// Of the move to SUCCEEDED: how many steps were trained, and how many of them changed nothing.
v1::Reason FinishedReason(const v1::JobStatus& status);

// After an attempt was given up the job stands where its newest checkpoint does; without one, at the beginning. `train` and `eval` are the
// newest rows that are left.
void RewindTo(v1::JobStatus& status, const v1::CheckpointManifest* checkpoint, const std::optional<v1::MetricRow>& train,
              const std::optional<v1::MetricRow>& eval);

// The new attempt's layout as shown to people.
void ShowPlan(v1::JobStatus& status, const v1::Plan& plan);

// "0-2" or "0-1,4-5": the layers of the stages that a rank holds.
std::string LayersOf(const v1::Plan& plan, const v1::RankPlan& rank);

}  // namespace ppft::coordinator
