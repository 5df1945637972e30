#include "worker/trainer/wire.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/proto_time.h"
#include "common/base/status.h"
#include "common/model/peft.h"
#include "ppft/v1/trainer.pb.h"

namespace ppft::trainer {
namespace {

FileOnDisk FromProto(const v1::LocalFile& file) { return {file.path(), file.content().name(), file.content().sha256(), file.content().size_bytes()}; }

std::vector<FileOnDisk> FromProto(const google::protobuf::RepeatedPtrField<v1::LocalFile>& files) {
  std::vector<FileOnDisk> out;
  for (const v1::LocalFile& file : files) out.push_back(FromProto(file));
  return out;
}

void ToProto(const std::vector<FileOnDisk>& files, google::protobuf::RepeatedPtrField<v1::LocalFile>* out) {
  for (const FileOnDisk& file : files) {
    v1::LocalFile* local = out->Add();
    local->set_path(file.path);
    local->mutable_content()->set_name(file.name);
    local->mutable_content()->set_sha256(file.sha256);
    local->mutable_content()->set_size_bytes(file.size_bytes);
  }
}

TrainingState FromProto(const v1::TrainingState& state) {
  TrainingState out;
  out.step = state.step();
  out.tokens_seen = state.tokens_seen();
  out.supervised_tokens = state.supervised_tokens();
  out.loss_scale = state.loss_scale();
  out.skipped_steps = state.skipped_steps();
  out.good_steps = state.good_steps();
  out.hysteresis_left = state.hysteresis_left();
  if (state.has_best_metric()) out.best_metric = state.best_metric();
  out.best_step = state.best_step();
  out.evaluations_without_improvement = state.evaluations_without_improvement();
  out.last_eval_step = state.last_eval_step();
  out.data_sha256 = state.data_sha256();
  out.model_sha256 = state.model_sha256();
  return out;
}

void ToProto(const TrainingState& state, v1::TrainingState* out) {
  out->set_step(state.step);
  out->set_tokens_seen(state.tokens_seen);
  out->set_supervised_tokens(state.supervised_tokens);
  out->set_loss_scale(state.loss_scale);
  out->set_skipped_steps(state.skipped_steps);
  out->set_good_steps(state.good_steps);
  out->set_hysteresis_left(state.hysteresis_left);
  if (state.best_metric.has_value()) out->set_best_metric(*state.best_metric);
  out->set_best_step(state.best_step);
  out->set_evaluations_without_improvement(state.evaluations_without_improvement);
  out->set_last_eval_step(state.last_eval_step);
  out->set_data_sha256(state.data_sha256);
  out->set_model_sha256(state.model_sha256);
}

void ToProto(const MetricRow& row, v1::MetricRow* out) {
  out->set_step(row.step);
  out->set_epoch(row.epoch);
  if (row.loss.has_value()) out->set_loss(*row.loss);
  if (row.learning_rate.has_value()) out->set_learning_rate(*row.learning_rate);
  if (row.grad_norm.has_value()) out->set_grad_norm(*row.grad_norm);
  if (row.eval_loss.has_value()) out->set_eval_loss(*row.eval_loss);
  out->set_tokens_per_second(row.tokens_per_second);
  out->set_loss_scale(row.loss_scale);
  out->set_skipped(row.skipped);
}

PlanSpec FromProto(const v1::Plan& plan) {
  PlanSpec out;
  out.data_parallel_size = plan.data_parallel_size();
  out.pipeline_parallel_size = plan.pipeline_parallel_size();
  out.virtual_stages = plan.virtual_stages();
  out.num_microbatches = plan.num_microbatches();
  out.zero_stage = plan.zero_stage();
  out.compute = plan.compute();
  out.total_steps = plan.total_steps();
  out.threads_per_rank = std::max(1, plan.threads_per_rank());
  out.microbatch_tokens = plan.microbatch_tokens();
  out.microbatches_per_pass = std::max(1, plan.microbatches_per_pass());
  for (const v1::StagePlan& stage : plan.stages()) {
    out.stages.push_back({stage.stage(), stage.first_layer(), stage.num_layers(), stage.has_embedding(), stage.has_head()});
  }
  for (const v1::RankPlan& rank : plan.ranks()) {
    out.ranks.push_back({rank.rank(),
                         rank.replica(),
                         rank.pipeline_rank(),
                         {rank.stages().begin(), rank.stages().end()},
                         rank.program(),
                         rank.device(),
                         rank.peak_bytes(),
                         rank.memory().runtime_bytes()});
  }
  return out;
}

LearningRateSchedule ScheduleOf(const v1::TrainingSpec& spec, int64_t total_steps) {
  LearningRateSchedule out;
  out.name = spec.lr_scheduler();
  out.learning_rate = spec.learning_rate();
  out.total_steps = total_steps;
  if (spec.has_warmup_steps()) {
    out.warmup_steps = spec.warmup_steps();
  } else if (spec.has_warmup_ratio()) {
    out.warmup_steps = StepsOfRatio(spec.warmup_ratio(), total_steps);
  }
  out.min_lr_ratio = spec.min_lr_ratio();
  out.decay_steps = std::max<int64_t>(0, std::min(StepsOfRatio(spec.decay_ratio(), total_steps), total_steps - out.warmup_steps));
  return out;
}

void ReadSpec(const v1::JobSpec& spec, TrainerConfig* config) {
  config->seed = static_cast<uint64_t>(spec.seed());
  const v1::AdapterSpec& adapter = spec.adapter();
  config->adapter.r = adapter.r();
  config->adapter.scale = model::LoraScale(adapter.r(), adapter.lora_alpha(), adapter.use_rslora());
  config->adapter.dropout = adapter.lora_dropout();
  config->adapter.target_modules = {adapter.target_modules().begin(), adapter.target_modules().end()};
  config->data.sequence_len = spec.data().sequence_len();
  config->data.sample_packing = spec.data().sample_packing();
  config->data.shuffle = spec.data().shuffle();
  if (!spec.parallel().activation_checkpointing().empty()) config->activation_checkpointing = spec.parallel().activation_checkpointing();
  config->cuda_graphs = spec.parallel().cuda_graphs() != "off";
  const v1::TrainingSpec& training = spec.training();
  config->data.micro_batch_size = training.micro_batch_size();
  config->schedule = ScheduleOf(training, config->plan.total_steps);
  config->optimizer.beta1 = training.adam_beta1();
  config->optimizer.beta2 = training.adam_beta2();
  config->optimizer.epsilon = training.adam_epsilon();
  config->optimizer.weight_decay = training.weight_decay();
  config->max_grad_norm = training.max_grad_norm();
  config->logging_steps = training.logging_steps();
  const v1::PrecisionSpec& precision = spec.precision();
  config->loss_scaler.active = config->plan.compute == "fp16";
  config->loss_scaler.loss_scale = precision.loss_scale();
  config->loss_scaler.initial_scale_power = precision.initial_scale_power();
  config->loss_scaler.window = precision.loss_scale_window();
  config->loss_scaler.hysteresis = precision.hysteresis();
  config->loss_scaler.min_scale = precision.min_loss_scale();
  config->loss_scaler.consecutive_hysteresis = precision.consecutive_hysteresis();
  config->evaluation.eval_steps = spec.evaluation().eval_steps();
  config->evaluation.eval_on_start = spec.evaluation().eval_on_start();
  if (spec.evaluation().has_early_stopping_patience()) config->evaluation.early_stopping_patience = spec.evaluation().early_stopping_patience();
  config->save_steps = spec.checkpoint().save_steps();
  config->load_best_model_at_end = spec.checkpoint().load_best_model_at_end();
  for (const std::string& format : spec.output().formats()) config->write_merged = config->write_merged || format == "merged";
  config->verify = spec.output().verify();
  if (spec.limits().has_stall_timeout()) config->stall_timeout = ToDuration(spec.limits().stall_timeout());
}

absl::StatusOr<TrainerConfig> FromProto(const v1::Start& start) {
  if (!start.has_spec() || !start.has_plan() || !start.has_train_tokens())
    return absl::InvalidArgumentError("Start lacks the spec, the plan or the training tokens");
  TrainerConfig config;
  config.job_id = start.job_id();
  config.epoch = start.epoch();
  config.rank = start.rank();
  config.plan = FromProto(start.plan());
  ReadSpec(start.spec(), &config);
  if (!start.plan().activation_checkpointing().empty()) config.activation_checkpointing = start.plan().activation_checkpointing();
  config.model_config = start.model_config();
  for (const v1::LocalTensor& tensor : start.tensors()) {
    config.tensors.push_back(
        {tensor.tensor().name(), tensor.tensor().dtype(), {tensor.tensor().shape().begin(), tensor.tensor().shape().end()}, tensor.path()});
  }
  config.train_tokens = FromProto(start.train_tokens());
  if (start.has_eval_tokens()) config.eval_tokens = FromProto(start.eval_tokens());
  config.init_adapter = FromProto(start.init_adapter());
  if (start.has_resume()) config.resume = FromProto(start.resume().state());
  config.resume_files = FromProto(start.resume_files());
  if (start.has_best()) config.best = FromProto(start.best().state());
  config.best_files = FromProto(start.best_files());
  config.directory = start.directory();
  config.listen_address = start.listen_address();
  config.beat_path = start.beat_path();
  if (!start.merge_dtype().empty()) config.merge_dtype = start.merge_dtype();
  return config;
}

std::string Bytes(const v1::TrainerReport& report) { return report.SerializeAsString(); }

const char* SeverityName(Severity severity) {
  switch (severity) {
    case Severity::kInfo:
      return "INFO";
    case Severity::kWarning:
      return "WARNING";
    case Severity::kError:
      return "ERROR";
  }
  return "INFO";
}

v1::TraceRow RowOf(TraceRow row) {
  switch (row) {
    case TraceRow::kCompute:
      return v1::TRACE_ROW_COMPUTE;
    case TraceRow::kSend:
      return v1::TRACE_ROW_SEND;
    case TraceRow::kReceive:
      return v1::TRACE_ROW_RECEIVE;
    case TraceRow::kCollective:
      return v1::TRACE_ROW_COLLECTIVE;
    case TraceRow::kOptimizer:
      return v1::TRACE_ROW_OPTIMIZER;
    case TraceRow::kEvaluation:
      return v1::TRACE_ROW_EVALUATION;
    case TraceRow::kCheckpoint:
      return v1::TRACE_ROW_CHECKPOINT;
  }
  return v1::TRACE_ROW_UNSPECIFIED;
}

}  // namespace

absl::StatusOr<AgentInput> ParseAgentMessage(absl::string_view bytes) {
  v1::AgentMessage message;
  if (!message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return absl::InvalidArgumentError("a frame of the agent is no AgentMessage");
  AgentInput input;
  if (message.has_start()) {
    PPFT_ASSIGN_OR_RETURN(input.start, FromProto(message.start()));
  } else if (message.has_peers()) {
    std::vector<std::string> endpoints(static_cast<size_t>(message.peers().endpoints_size()));
    for (const v1::Endpoint& endpoint : message.peers().endpoints()) {
      if (endpoint.rank() < 0 || endpoint.rank() >= message.peers().endpoints_size()) {
        return absl::InvalidArgumentError(absl::StrCat("the endpoint of rank ", endpoint.rank(), " is one too many"));
      }
      endpoints[static_cast<size_t>(endpoint.rank())] = endpoint.address();
    }
    input.peers = std::move(endpoints);
  } else if (message.has_trace()) {
    input.trace = TraceOrder{message.trace().id(), message.trace().num_steps()};
  } else {
    return absl::InvalidArgumentError("an AgentMessage of a kind that this trainer does not know");
  }
  return input;
}

std::string EncodeListening(const std::string& address) {
  v1::TrainerReport report;
  report.mutable_listening()->set_address(address);
  return Bytes(report);
}

std::string EncodeReady() {
  v1::TrainerReport report;
  report.mutable_ready();
  return Bytes(report);
}

std::string Encode(const StepReport& step) {
  v1::TrainerReport report;
  v1::StepReport* out = report.mutable_step();
  ToProto(step.row, out->mutable_row());
  out->set_tokens_seen(step.tokens_seen);
  out->set_supervised_tokens(step.supervised_tokens);
  out->set_skipped_steps(step.skipped_steps);
  for (const SkippedStep& skipped : step.skipped) {
    v1::SkippedStep* entry = out->add_skipped();
    entry->set_step(skipped.step);
    entry->set_reason(skipped.reason);
    entry->set_loss_scale(skipped.loss_scale);
    entry->set_next_loss_scale(skipped.next_loss_scale);
  }
  out->set_seconds(step.seconds);
  return Bytes(report);
}

std::string Encode(const EvalReport& eval) {
  v1::TrainerReport report;
  v1::EvalReport* out = report.mutable_eval();
  ToProto(eval.row, out->mutable_row());
  out->set_best(eval.best);
  if (eval.best_metric.has_value()) out->set_best_metric(*eval.best_metric);
  out->set_best_step(eval.best_step);
  out->set_seconds(eval.seconds);
  return Bytes(report);
}

std::string Encode(const CheckpointWritten& checkpoint) {
  v1::TrainerReport report;
  v1::CheckpointWritten* out = report.mutable_checkpoint();
  ToProto(checkpoint.state, out->mutable_state());
  ToProto(checkpoint.files, out->mutable_files());
  out->set_best(checkpoint.best);
  if (checkpoint.eval_loss.has_value()) out->set_eval_loss(*checkpoint.eval_loss);
  return Bytes(report);
}

std::string Encode(const StageStats& stats) {
  v1::TrainerReport report;
  v1::StageStats* out = report.mutable_stats();
  for (const auto& [kind, seconds] : stats.busy_seconds) (*out->mutable_busy_seconds())[kind] = seconds;
  out->set_sent_bytes(stats.sent_bytes);
  out->set_received_bytes(stats.received_bytes);
  out->set_memory_bytes(stats.memory_bytes);
  out->set_pipeline_rank(stats.pipeline_rank);
  out->set_bubble_ratio(stats.bubble_ratio);
  return Bytes(report);
}

std::string EncodeFinished(const TrainingState& state, const std::string& reason) {
  v1::TrainerReport report;
  ToProto(state, report.mutable_finished()->mutable_state());
  report.mutable_finished()->set_reason(reason);
  return Bytes(report);
}

std::string Encode(const ExportWritten& exported) {
  v1::TrainerReport report;
  v1::ExportWritten* out = report.mutable_exported();
  out->set_step(exported.step);
  ToProto(exported.adapter_files, out->mutable_adapter_files());
  ToProto(exported.merged_files, out->mutable_merged_files());
  for (const Verification& verification : exported.verifications) {
    v1::Verification* v = out->add_verifications();
    v->set_type(verification.type);
    v->set_max_relative_difference(verification.max_relative_difference);
    v->mutable_probe_ids()->Assign(verification.probe_ids.begin(), verification.probe_ids.end());
    v->set_max_absolute_difference(verification.max_absolute_difference);
    v->mutable_logit_ids()->Assign(verification.logit_ids.begin(), verification.logit_ids.end());
    v->mutable_last_logits()->Assign(verification.last_logits.begin(), verification.last_logits.end());
  }
  return Bytes(report);
}

std::string EncodeLog(const std::string& source, Severity severity, const std::string& text) {
  v1::TrainerReport report;
  v1::LogLine* out = report.mutable_log();
  SetTime(absl::Now(), out->mutable_time());
  out->set_source(source);
  out->set_severity(SeverityName(severity));
  out->set_text(text);
  return Bytes(report);
}

std::string Encode(const RankTrace& trace) {
  v1::TrainerReport report;
  v1::RankTrace* out = report.mutable_trace();
  out->set_id(trace.id);
  out->set_first_step(trace.first_step);
  out->set_last_step(trace.last_step);
  out->set_device_times(trace.device_times);
  out->set_last(trace.last);
  for (const TraceSpan& span : trace.spans) {
    v1::TraceSpan* to = out->add_spans();
    to->set_row(RowOf(span.row));
    to->set_name(span.name);
    to->set_step(span.step);
    to->set_stage(span.stage);
    to->set_microbatch(span.microbatch);
    to->set_begin_unix_nanos(span.begin_unix_nanos);
    to->set_duration_nanos(span.duration_nanos);
    to->set_evaluation(span.evaluation);
  }
  return Bytes(report);
}

std::string Encode(const FailureReport& failure) {
  v1::TrainerReport report;
  v1::Failure* out = report.mutable_failure();
  out->mutable_reason()->set_code(failure.code);
  out->mutable_reason()->set_owner(failure.owner);
  out->mutable_reason()->set_message(failure.message);
  out->mutable_reason()->set_remedy(failure.remedy);
  out->set_step(failure.step);
  out->set_peer(failure.peer);
  return Bytes(report);
}

}  // namespace ppft::trainer
