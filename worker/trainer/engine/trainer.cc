#include "worker/trainer/engine/trainer.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/model/peft.h"
#include "worker/trainer/engine/failure.h"
#include "worker/trainer/engine/stats_thread.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {

Trainer::Trainer(TrainerConfig config, Reporter* reporter, Beat* beat, CudaRuntime* cuda, StageFactory factory)
    : config_(std::move(config)),
      reporter_(reporter),
      cuda_(cuda),
      factory_(std::move(factory)),
      mesh_{config_.plan.data_parallel_size, config_.plan.pipeline_parallel_size, config_.plan.virtual_stages},
      activity_(beat),
      scaler_(config_.loss_scaler) {
  FollowOrders(&no_orders_);
}

Trainer::~Trainer() = default;

void Trainer::Abort(const absl::Status& cause) {
  if (transport_ != nullptr) transport_->Abort(cause);
}

bool Trainer::is_reporter() const { return config_.me().replica == 0 && config_.me().pipeline_rank == plan().pipeline_parallel_size - 1; }

std::vector<StageModel*> Trainer::Stages() const {
  std::vector<StageModel*> stages;
  for (const auto& [stage, model] : stages_) stages.push_back(model.get());
  return stages;
}

std::map<int, StageModel*> Trainer::StageMap() const {
  std::map<int, StageModel*> map;
  for (const auto& [stage, model] : stages_) map[stage] = model.get();
  return map;
}

std::string Trainer::ParameterName(size_t index) const {
  const std::vector<std::string>& modules = config_.adapter.target_modules;
  return model::PeftKey(static_cast<int64_t>(index / parameters_per_layer()), modules[index / 2 % modules.size()], index % 2 == 0 ? "lora_A" : "lora_B");
}

absl::Status Trainer::WithCause(const absl::Status& status) const {
  if (absl::IsInternal(status)) PPFT_RETURN_IF_ERROR(TransportStatus());
  return status;
}

absl::Status Trainer::Run() {
  const c10::InferenceMode guard;
  if (cuda_ != nullptr) activity_.UseDevice(cuda_->MakeTimer());
  activity_.Enter(Section::kStarting);
  StartStats();
  reporter_->Ready();
  PPFT_RETURN_IF_ERROR(WithCause(Train()));
  PPFT_RETURN_IF_ERROR(WithCause(Export()));
  PPFT_RETURN_IF_ERROR(AwaitAll());
  stats_.reset();
  if (transport_ != nullptr) PPFT_RETURN_IF_ERROR(transport_->Close());
  activity_.Enter(Section::kDone);
  return absl::OkStatus();
}

void Trainer::StartStats() { stats_ = std::make_unique<StatsThread>(config_.me().pipeline_rank, &activity_, transport_.get(), reporter_, &device_peak_bytes_); }

bool Trainer::EvalDue(int64_t step) const {
  if (!has_eval() || state_.last_eval_step == step) return false;
  if (step == plan().total_steps) return true;
  return config_.evaluation.eval_steps > 0 && step > 0 && step % config_.evaluation.eval_steps == 0;
}

bool Trainer::StopsEarly() const {
  const std::optional<int>& patience = config_.evaluation.early_stopping_patience;
  return has_eval() && patience.has_value() && state_.evaluations_without_improvement >= *patience;
}

absl::Status Trainer::Train() {
  reported_at_ = absl::Now();
  bool new_best = false;
  std::optional<double> eval_loss;
  if (has_eval() && state_.step == 0 && config_.evaluation.eval_on_start && state_.last_eval_step < 0) {
    PPFT_RETURN_IF_ERROR(Evaluate(0, &new_best, &eval_loss));
  }
  if (state_.step < plan().total_steps) PPFT_RETURN_IF_ERROR(GatherOrders());
  while (state_.step < plan().total_steps && !StopsEarly()) {
    const int64_t step = state_.step + 1;
    activity_.SetStep(step);
    tracer_->BeginStep(step);
    PPFT_RETURN_IF_ERROR(TrainStep(step));
    activity_.Rest();
    new_best = false;
    eval_loss.reset();
    if (EvalDue(step)) PPFT_RETURN_IF_ERROR(Evaluate(step, &new_best, &eval_loss));
    const bool last = step == plan().total_steps || StopsEarly();
    const bool due = config_.save_steps > 0 && step % config_.save_steps == 0;
    const bool keeps_best = new_best && config_.load_best_model_at_end;
    if (keeps_best) adapter_->KeepBest();
    if (last || due || keeps_best) PPFT_RETURN_IF_ERROR(WriteCheckpoint(new_best, eval_loss));
    activity_.Rest();
  }
  tracer_->Finish(state_.step);
  FillState(state_.step);
  reporter_->Finished(state_, state_.step < plan().total_steps ? "early_stopping" : "max_steps");
  return absl::OkStatus();
}

absl::Status Trainer::GatherOrders() {
  const auto mine = static_cast<double>(tracer_->Offer());
  PPFT_ASSIGN_OR_RETURN(const std::vector<double> all,
                        world_->AllGather(absl::MakeConstSpan(&mine, 1), std::vector<int64_t>(static_cast<size_t>(mesh_.num_ranks()), 1)));
  tracer_->Agree({all.begin(), all.end()});
  return absl::OkStatus();
}

void Trainer::LogPeakMemory() {
  const RankSpec& me = config_.me();
  if (cuda_ == nullptr) {
    struct rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    Log(absl::StrFormat("memory: %d bytes at the peak, %d planned", usage.ru_maxrss * int64_t{1024}, me.peak_bytes));
    return;
  }
  RecordDeviceMemory();
  const CudaMemory memory = cuda_->Memory(0);
  Log(absl::StrFormat("device memory: %d bytes at the peak, %d planned; %d bytes outside of the allocator, %d planned; tensors held %d",
                      device_peak_bytes_.load(), me.peak_bytes - me.runtime_bytes, memory.device_bytes - memory.device_free_bytes - memory.reserved_bytes,
                      me.runtime_bytes, memory.peak_allocated_bytes));
}

void Trainer::RecordDeviceMemory() {
  if (cuda_ != nullptr) device_peak_bytes_ = cuda_->Memory(0).peak_reserved_bytes;
}

absl::Status Trainer::TrainStep(int64_t step) {
  const data::StepPlan step_plan = sampler_->Step(step);
  const double scale = scaler_.scale();
  const InputOptions input_options = {step, scale / static_cast<double>(std::max<int64_t>(1, step_plan.targets)), /*training=*/true};
  const std::vector<MicrobatchInput> inputs =
      InputsOf(train_data_->rows(), step_plan.microbatches[static_cast<size_t>(config_.me().replica)], plan().microbatches_per_pass, input_options);
  adapter_->ZeroGradients();
  if (const at::Tensor total = LossTotal(); total.defined()) total.zero_();
  PassOptions options;
  options.pass = next_pass_++;
  options.keep_for_backward = true;
  PPFT_RETURN_IF_ERROR(interpreter_->Run(program_, inputs, options, nullptr));

  activity_.Enter(Section::kReduce);
  PPFT_RETURN_IF_ERROR(adapter_->ReduceGradients());
  PPFT_ASSIGN_OR_RETURN(const StepSums sums, GatherSums());
  const absl::Status finite = CheckFinite(sums, step_plan);
  const bool skipped = !finite.ok();
  if (skipped && !scaler_.active()) return FoundByAll(finite);
  double squares = 0;
  for (const double square : sums.squares) squares += square;
  const double grad_norm = std::sqrt(squares) / scale;
  // Schedule and AdamW count the steps that were taken, as DeepSpeed and accelerate do: a skipped one is made up for at the same rate.
  const int64_t update = step - state_.skipped_steps;
  const double learning_rate = LearningRate(config_.schedule, update);

  activity_.Enter(Section::kOptimizer);
  if (skipped) {
    if (scaler_.exhausted()) return FoundByAll(NoSmallerScale(finite, scale));
    ++state_.skipped_steps;
  } else {
    PPFT_RETURN_IF_ERROR(adapter_->Update(update, learning_rate, ClipFactor(grad_norm, config_.max_grad_norm) / scale));
  }
  scaler_.Update(skipped);
  if (skipped) NoteSkipped(step, scale, finite);
  state_.tokens_seen += step_plan.tokens;
  state_.supervised_tokens += step_plan.targets;
  FillState(step);
  ReportStep(step_plan, sums.loss_sum / static_cast<double>(std::max<int64_t>(1, step_plan.targets)), learning_rate, grad_norm, skipped);
  return absl::OkStatus();
}

absl::StatusOr<Trainer::StepSums> Trainer::GatherSums() {
  const auto per_layer = static_cast<int64_t>(parameters_per_layer());
  PPFT_ASSIGN_OR_RETURN(std::vector<double> mine, adapter_->Sums(LossTotal()));
  PPFT_RETURN_IF_ERROR(TransportStatus());  // what a lost peer left on the device ends here
  RecordDeviceMemory();
  activity_.Collect();
  mine.push_back(static_cast<double>(tracer_->Offer()));
  std::vector<int64_t> counts;
  for (const RankSpec& rank : plan().ranks) {
    int64_t count = 2;  // the loss and the trace order
    for (const int stage : rank.stages) count += per_layer * plan().stages[static_cast<size_t>(stage)].num_layers;
    counts.push_back(count);
  }
  PPFT_ASSIGN_OR_RETURN(const std::vector<double> all, world_->AllGather(absl::MakeConstSpan(mine), counts));
  // Model order whatever the layout: the same sum to the last bit wherever a parameter lives.
  StepSums sums;
  std::vector<int64_t> offset_of_stage(plan().stages.size() + 1, 0);
  for (size_t s = 0; s < plan().stages.size(); ++s) offset_of_stage[s + 1] = offset_of_stage[s] + per_layer * plan().stages[s].num_layers;
  sums.squares.assign(static_cast<size_t>(offset_of_stage.back()), 0.0);
  std::vector<int64_t> offers;
  size_t at = 0;
  for (const RankSpec& rank : plan().ranks) {
    sums.loss_sum += all[at++];
    for (const int stage : rank.stages) {
      for (int64_t i = offset_of_stage[static_cast<size_t>(stage)]; i < offset_of_stage[static_cast<size_t>(stage) + 1]; ++i)
        sums.squares[static_cast<size_t>(i)] += all[at++];
    }
    offers.push_back(static_cast<int64_t>(all[at++]));
  }
  tracer_->Agree(offers);
  return sums;
}

absl::Status Trainer::CheckFinite(const StepSums& sums, const data::StepPlan& step_plan) const {
  constexpr char kRemedy[] = "lower training.learning_rate, raise training.warmup_steps, or look for damaged rows in the data";
  if (!std::isfinite(sums.loss_sum)) {
    return WithReason(absl::OutOfRangeError(absl::StrCat("the loss of step ", step_plan.step, " is not finite (stage ", plan().stages.size() - 1, ")")),
                      "NUMERIC_DIVERGENCE", "USER", kRemedy);
  }
  for (size_t i = 0; i < sums.squares.size(); ++i) {
    if (std::isfinite(sums.squares[i])) continue;
    const int layer = static_cast<int>(i / parameters_per_layer());
    int stage = 0;
    while (plan().stages[static_cast<size_t>(stage)].first_layer + plan().stages[static_cast<size_t>(stage)].num_layers <= layer) ++stage;
    return WithReason(
        absl::OutOfRangeError(absl::StrCat("the gradient of ", ParameterName(i), " is not finite in step ", step_plan.step, " (stage ", stage, ")")),
        "NUMERIC_DIVERGENCE", "USER", kRemedy);
  }
  return absl::OkStatus();
}

absl::Status Trainer::NoSmallerScale(const absl::Status& finite, double scale) const {
  return WithReason(
      absl::OutOfRangeError(absl::StrFormat("%s, and the loss scale cannot go below %.15g", finite.message(), scale)), "NUMERIC_DIVERGENCE", "USER",
      absl::StrCat(scale > 1 ? "lower precision.min_loss_scale, " : "",
                   "lower training.learning_rate, raise training.warmup_steps, use precision.compute: bf16, or look for damaged rows in the data"));
}

absl::Status Trainer::FoundByAll(absl::Status failure) {
  const double nothing = 0;
  [[maybe_unused]] const absl::Status ignored = world_->AllGather(absl::MakeConstSpan(&nothing, 1), std::vector<int64_t>(plan().ranks.size(), 1)).status();
  return failure;
}

void Trainer::NoteSkipped(int64_t step, double scale, const absl::Status& reason) {
  skipped_.push_back({step, std::string(reason.message()), scale, scaler_.scale()});
}

void Trainer::ReportStep(const data::StepPlan& step_plan, double loss, double learning_rate, double grad_norm, bool skipped) {
  reported_tokens_ += step_plan.tokens;
  if (step_plan.step % config_.logging_steps != 0 && step_plan.step != plan().total_steps) return;
  const absl::Time now = absl::Now();
  StepReport report;
  report.seconds = absl::ToDoubleSeconds(now - reported_at_);
  report.row.step = step_plan.step;
  report.row.epoch = step_plan.epoch;
  report.row.loss = loss;
  report.row.learning_rate = learning_rate;
  report.row.grad_norm = grad_norm;
  report.row.tokens_per_second = report.seconds > 0 ? static_cast<double>(reported_tokens_) / report.seconds : 0;
  report.row.loss_scale = scaler_.scale();
  report.row.skipped = skipped;
  report.tokens_seen = state_.tokens_seen;
  report.supervised_tokens = state_.supervised_tokens;
  report.skipped_steps = state_.skipped_steps;
  report.skipped = std::move(skipped_);
  skipped_.clear();
  reported_at_ = now;
  reported_tokens_ = 0;
  if (is_reporter()) reporter_->Step(report);
}

at::Tensor Trainer::LossTotal() const {
  const auto last = stages_.find(mesh_.num_stages() - 1);
  return last == stages_.end() ? at::Tensor() : last->second->loss_total();
}

absl::StatusOr<double> Trainer::EvaluationLoss() {
  const at::Tensor total = LossTotal();
  if (total.defined()) total.zero_();
  const size_t per_window = static_cast<size_t>(eval_window_) * static_cast<size_t>(plan().microbatches_per_pass);
  for (size_t begin = 0; begin < eval_plan_.size(); begin += per_window) {
    const std::vector<MicrobatchInput> inputs =
        InputsOf(eval_data_->rows(), absl::MakeConstSpan(eval_plan_).subspan(begin, per_window), plan().microbatches_per_pass, {0, 1.0, /*training=*/false});
    PassOptions options;
    options.pass = next_pass_++;
    PPFT_RETURN_IF_ERROR(interpreter_->Run(eval_program_, inputs, options, nullptr));
  }
  activity_.Enter(Section::kReduce);
  double loss_sum = 0;
  PPFT_RETURN_IF_ERROR(CatchTorch("evaluation", [&]() -> absl::Status {
    if (total.defined()) loss_sum = total.item<double>();
    return TransportStatus();
  }));
  activity_.Collect();
  PPFT_RETURN_IF_ERROR(world_->AllReduceSum(absl::Span<double>(&loss_sum, 1)));
  return loss_sum / static_cast<double>(std::max<int64_t>(1, eval_targets_));
}

absl::Status Trainer::Evaluate(int64_t step, bool* new_best, std::optional<double>* eval_loss) {
  const absl::Time begin = absl::Now();
  activity_.SetEvaluation(true);
  PPFT_ASSIGN_OR_RETURN(const double loss, EvaluationLoss());
  activity_.Rest();
  activity_.SetEvaluation(false);
  if (activity_.tracing()) {
    TraceSpan span;
    span.row = TraceRow::kEvaluation;
    span.name = "evaluation";
    span.step = step;
    span.begin_unix_nanos = absl::ToUnixNanos(begin);
    span.duration_nanos = absl::ToInt64Nanoseconds(absl::Now() - begin);
    activity_.AddSpan(std::move(span));
  }
  if (!std::isfinite(loss)) {
    return FoundByAll(
        WithReason(absl::OutOfRangeError(absl::StrCat("the evaluation loss after step ", step, " is not finite (stage ", plan().stages.size() - 1, ")")),
                   "NUMERIC_DIVERGENCE", "USER", "lower training.learning_rate or look for damaged evaluation rows"));
  }
  state_.last_eval_step = step;
  *eval_loss = loss;
  *new_best = false;
  // The untrained model is measured for comparison; it is no candidate for the best.
  if (step > 0) {
    *new_best = !state_.best_metric.has_value() || loss < *state_.best_metric;
    if (*new_best) {
      state_.best_metric = loss;
      state_.best_step = step;
      state_.evaluations_without_improvement = 0;
    } else {
      ++state_.evaluations_without_improvement;
    }
  }
  if (is_reporter()) {
    EvalReport report;
    report.row.step = step;
    report.row.epoch = step == 0 ? 0.0 : sampler_->Step(step).epoch;
    report.row.eval_loss = loss;
    report.row.loss_scale = scaler_.scale();
    report.best = *new_best;
    report.best_metric = state_.best_metric;
    report.best_step = state_.best_step;
    report.seconds = absl::ToDoubleSeconds(absl::Now() - begin);
    reporter_->Eval(report);
  }
  reported_at_ += absl::Now() - begin;  // not part of the steps' time
  return absl::OkStatus();
}

void Trainer::FillState(int64_t step) {
  state_.step = step;
  state_.loss_scale = scaler_.scale();
  state_.good_steps = scaler_.good_steps();
  state_.hysteresis_left = scaler_.hysteresis_left();
  state_.data_sha256 = config_.train_tokens.sha256;
  state_.model_sha256 = Sha256Hex(config_.model_config);
}

absl::Status Trainer::WriteCheckpoint(bool best, const std::optional<double>& eval_loss) {
  const absl::Time begin = absl::Now();
  activity_.Enter(Section::kCheckpoint);
  PPFT_ASSIGN_OR_RETURN(const std::vector<NamedTensor> tensors, adapter_->CheckpointTensors());
  PPFT_RETURN_IF_ERROR(TransportStatus());
  checkpoint_step_ = state_.step;
  if (config_.me().replica != 0) return absl::OkStatus();
  const std::string name = absl::StrFormat("step-%d-rank-%d.safetensors", state_.step, config_.rank);
  absl::StatusOr<WrittenFile> written = WriteTensorFile(JoinPath(config_.directory, name), tensors, {{"format", "pt"}});
  if (!written.ok()) {
    const absl::Status failed = Annotate(written.status(), absl::StrCat("checkpoint of step ", state_.step));
    return absl::IsResourceExhausted(failed) ? WithReason(failed, "DISK_FULL", "OPERATOR", "free space on the worker's disk") : failed;
  }
  CheckpointWritten report;
  report.state = state_;
  report.files.push_back({written->path, name, written->sha256, written->size_bytes});
  report.best = best;
  report.eval_loss = eval_loss;
  reporter_->Checkpoint(report);
  Log(absl::StrFormat("checkpoint of step %d written, %d bytes, %.2f s", state_.step, written->size_bytes, absl::ToDoubleSeconds(absl::Now() - begin)));
  reported_at_ += absl::Now() - begin;
  return absl::OkStatus();
}

}  // namespace ppft::trainer
