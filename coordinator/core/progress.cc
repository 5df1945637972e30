#include "coordinator/core/progress.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "coordinator/core/job_state.h"

namespace ppft::coordinator {

void ApplyStep(v1::JobStatus& status, const v1::StepReport& report) {
  const v1::MetricRow& row = report.row();
  const int64_t steps = row.step() - status.step();
  if (steps > 0 && report.seconds() > 0 && status.total_steps() >= row.step()) {
    const double left = report.seconds() / static_cast<double>(steps) * static_cast<double>(status.total_steps() - row.step());
    status.mutable_eta()->set_seconds(static_cast<int64_t>(left));
    status.mutable_eta()->set_nanos(static_cast<int32_t>((left - static_cast<double>(static_cast<int64_t>(left))) * 1e9));
  }
  status.set_step(row.step());
  status.set_epoch(row.epoch());
  if (row.has_loss()) status.set_loss(row.loss());
  if (row.has_learning_rate()) status.set_learning_rate(row.learning_rate());
  if (row.has_grad_norm()) status.set_grad_norm(row.grad_norm());
  status.set_tokens_seen(report.tokens_seen());
  status.set_supervised_tokens(report.supervised_tokens());
  status.set_skipped_steps(report.skipped_steps());
  status.set_loss_scale(row.loss_scale());
  status.set_tokens_per_second(row.tokens_per_second());
}

std::string SkippedText(const v1::SkippedStep& skipped) {
  const std::string text = absl::StrFormat("step %d changed nothing: %s; the loss scale ", skipped.step(), skipped.reason());
  if (skipped.next_loss_scale() == skipped.loss_scale()) return text + absl::StrFormat("stays %.15g", skipped.loss_scale());
  return text + absl::StrFormat("goes from %.15g to %.15g", skipped.loss_scale(), skipped.next_loss_scale());
}

v1::Reason FinishedReason(const v1::JobStatus& status) {
  const std::string trained = absl::StrCat("trained ", status.step(), status.step() == 1 ? " step" : " steps");
  if (status.skipped_steps() == 0) return MakeReason("FINISHED", trained);
  if (status.skipped_steps() < status.step()) return MakeReason("FINISHED", absl::StrCat(trained, ", of which ", status.skipped_steps(), " changed nothing"));
  return MakeReason("FINISHED", absl::StrCat(trained, ", and none of them changed anything: the adapter is what it was at the start"),
                    absl::StrFormat("begin below the loss scale of %.15g, or use precision.compute: bf16", status.loss_scale()));
}

void ApplyEval(v1::JobStatus& status, const v1::EvalReport& report) {
  if (report.row().has_eval_loss()) {
    status.set_eval_loss(report.row().eval_loss());
    if (!status.has_first_eval_loss()) status.set_first_eval_loss(report.row().eval_loss());
  }
  if (report.has_best_metric()) {
    status.set_best_metric(report.best_metric());
    status.set_best_step(report.best_step());
  }
}

void RewindTo(v1::JobStatus& status, const v1::CheckpointManifest* checkpoint, const std::optional<v1::MetricRow>& train,
              const std::optional<v1::MetricRow>& eval) {
  const v1::TrainingState state = checkpoint == nullptr ? v1::TrainingState() : checkpoint->state();
  status.set_step(state.step());
  status.set_tokens_seen(state.tokens_seen());
  status.set_supervised_tokens(state.supervised_tokens());
  status.set_skipped_steps(state.skipped_steps());
  status.set_loss_scale(state.loss_scale());
  status.set_checkpoint_step(state.step());
  status.set_best_step(state.best_step());
  if (state.has_best_metric()) {
    status.set_best_metric(state.best_metric());
  } else {
    status.clear_best_metric();
  }
  status.set_epoch(train.has_value() ? train->epoch() : 0);
  status.clear_loss();
  status.clear_learning_rate();
  status.clear_grad_norm();
  status.clear_eval_loss();
  if (train.has_value() && train->has_loss()) status.set_loss(train->loss());
  if (train.has_value() && train->has_learning_rate()) status.set_learning_rate(train->learning_rate());
  if (train.has_value() && train->has_grad_norm()) status.set_grad_norm(train->grad_norm());
  if (eval.has_value()) status.set_eval_loss(eval->eval_loss());
}

std::string LayersOf(const v1::Plan& plan, const v1::RankPlan& rank) {
  std::string layers;
  for (const int32_t stage : rank.stages()) {
    if (stage < 0 || stage >= plan.stages_size() || plan.stages(stage).num_layers() == 0) continue;
    const v1::StagePlan& held = plan.stages(stage);
    absl::StrAppend(&layers, layers.empty() ? "" : ",", held.first_layer());
    if (held.num_layers() > 1) absl::StrAppend(&layers, "-", held.first_layer() + held.num_layers() - 1);
  }
  return layers;
}

void ShowPlan(v1::JobStatus& status, const v1::Plan& plan) {
  status.clear_assignment();
  for (const v1::RankPlan& rank : plan.ranks()) {
    v1::JobStatus::Assignment& shown = *status.add_assignment();
    shown.set_stage(rank.pipeline_rank());
    shown.set_worker(rank.worker());
    shown.set_device(rank.device());
    shown.set_layers(LayersOf(plan, rank));
    shown.set_replica(rank.replica());
    shown.set_rank(rank.rank());
    if (rank.has_memory()) *shown.mutable_memory() = rank.memory();
  }
  status.set_schedule(plan.schedule());
  status.set_activation_checkpointing(plan.activation_checkpointing());
  status.set_microbatches_per_pass(std::max(1, plan.microbatches_per_pass()));
  status.set_total_steps(plan.total_steps());
}

}  // namespace ppft::coordinator
