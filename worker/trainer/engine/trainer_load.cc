// Trainer: what happens before the first step.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/model/memory.h"
#include "common/model/peft.h"
#include "common/pipeline/lowering.h"
#include "common/pipeline/schedule.h"
#include "worker/trainer/engine/device_replica_exchange.h"
#include "worker/trainer/engine/failure.h"
#include "worker/trainer/engine/host_adapter_state.h"
#include "worker/trainer/engine/host_replica_exchange.h"
#include "worker/trainer/engine/stats_thread.h"
#include "worker/trainer/engine/trainer.h"

namespace ppft::trainer {
namespace {

// Peers load their stages before they answer.
constexpr absl::Duration kPeersLoad = absl::Minutes(10);

// Passes of up to so many tokens are padded to one of a few shapes.
constexpr int64_t kMostPaddedTokens = 2048;
constexpr int64_t kLeastTokenMultiple = 64;
constexpr int64_t kShapes = 16;
// A peer that gives no sign of life for so long is lost: a stopped process must not hold a device for minutes.
constexpr absl::Duration kDevicePeerSilence = absl::Seconds(8);

absl::Status ModelInvalid(const absl::Status& status) {
  if (absl::IsResourceExhausted(status)) return status;
  return WithReason(status, "MODEL_INVALID", "USER", "register a complete Llama model again");
}

absl::StatusOr<at::ScalarType> ComputeType(const std::string& name) {
  if (name == "fp32") return at::kFloat;
  if (name == "bf16") return at::kBFloat16;
  if (name == "fp16") return at::kHalf;
  return absl::InvalidArgumentError(absl::StrCat("precision.compute \"", name, "\" is unknown: use fp32, bf16 or fp16"));
}

std::vector<std::string> PathsOf(const std::vector<FileOnDisk>& files) {
  std::vector<std::string> paths;
  for (const FileOnDisk& file : files) paths.push_back(file.path);
  return paths;
}

// The base model's tensors of this rank, mapped when asked for. Each is a beat: what reads them all takes as long as the disk needs.
TensorSource SourceOfTensors(const std::vector<BaseTensor>& tensors, Activity* activity) {
  auto by_name = std::make_shared<std::map<std::string, BaseTensor>>();
  for (const BaseTensor& tensor : tensors) (*by_name)[tensor.name] = tensor;
  return [by_name, activity](const std::string& name) -> absl::StatusOr<at::Tensor> {
    activity->Progress();
    auto found = by_name->find(name);
    if (found == by_name->end()) return absl::NotFoundError(absl::StrCat("tensor ", name, " was not given to this rank"));
    PPFT_ASSIGN_OR_RETURN(const at::ScalarType dtype, DtypeOfWord(found->second.dtype));
    return MapRawTensor(found->second.path, dtype, found->second.shape);
  };
}

}  // namespace

StageOptions Trainer::OptionsOf(int stage) const {
  const StageSpec& spec = plan().stages[static_cast<size_t>(stage)];
  StageOptions options;
  options.stage = stage;
  options.first_layer = spec.first_layer;
  options.num_layers = spec.num_layers;
  options.has_embedding = spec.has_embedding;
  options.has_head = spec.has_head;
  options.compute = compute_;
  options.checkpointing = checkpointing_;
  if (shares_layers()) {
    options.weights = WeightHome::kSharded;
    options.num_replicas = plan().data_parallel_size;
    options.replica = config_.me().replica;
  }
  if (cuda_ != nullptr) {
    options.device = at::Device(at::kCUDA, 0);
    options.kernels = &cuda_->KernelsOf(0);
    options.head_chunk_rows = checkpointing_ == model::ActivationCheckpointing::kFull ? model::kCudaSmallHeadRows : model::kCudaHeadRows;
    options.least_tokens = plan().pass_tokens();
    // The host cannot launch small passes as fast as a GPU does them: few shapes, captured. Padding large ones would cost more than it gains.
    if (plan().pass_tokens() <= kMostPaddedTokens) {
      options.token_multiple = std::max<int64_t>(kLeastTokenMultiple, plan().pass_tokens() / kShapes);
    }
    options.capture = config_.cuda_graphs && plan().pass_tokens() <= model::kMostCapturedTokens &&
                      !model::AttentionIsPlainProducts(static_cast<int64_t>(c10::elementSize(compute_)), model_config_.head_dim);
  }
  options.lora.r = config_.adapter.r;
  options.lora.scale = config_.adapter.scale;
  options.lora.dropout = config_.adapter.dropout;
  options.lora.seed = config_.seed;
  options.lora.target_modules = config_.adapter.target_modules;
  return options;
}

absl::Status Trainer::Load() {
  activity_.Enter(Section::kLoading);
  const absl::Time begin = absl::Now();
  PPFT_RETURN_IF_ERROR(WithReason(CheckConfig(config_), "SPEC_INVALID", "USER", "correct the job and submit it again"));
  PPFT_ASSIGN_OR_RETURN(compute_, ComputeType(plan().compute));
  if (compute_ != at::kFloat && cuda_ == nullptr) {
    reporter_->Log(Severity::kWarning,
                   absl::StrCat(plan().compute, " is slow on a CPU, which has no fast products for it: precision.compute: fp32 is faster there"));
  }
  PPFT_ASSIGN_OR_RETURN(checkpointing_, model::ParseActivationCheckpointing(config_.activation_checkpointing));
  PPFT_ASSIGN_OR_RETURN(program_, pipeline::ParseProgram(config_.me().program));
  PPFT_RETURN_IF_ERROR(CheckPasses(program_, plan()));
  absl::StatusOr<model::ModelConfig> parsed = model::ParseModelConfig(config_.model_config, "config.json");
  PPFT_RETURN_IF_ERROR(ModelInvalid(parsed.status()));
  model_config_ = *std::move(parsed);
  PPFT_RETURN_IF_ERROR(LoadData());
  PPFT_RETURN_IF_ERROR(LoadStages());
  activity_.Enter(Section::kConnecting);  // from here on it waits for the others
  Log(absl::StrFormat("rank %d loaded in %.2f s", config_.rank, absl::ToDoubleSeconds(absl::Now() - begin)));
  return absl::OkStatus();
}

absl::Status Trainer::LoadData() {
  const auto invalid = [](const absl::Status& status) { return WithReason(status, "DATASET_INVALID", "USER", "prepare the dataset again"); };
  absl::StatusOr<std::unique_ptr<TokenData>> train = TokenData::Open(config_.train_tokens.path, model_config_.vocab_size);
  PPFT_RETURN_IF_ERROR(invalid(train.status()));
  train_data_ = *std::move(train);
  absl::StatusOr<data::Sampler> sampler = data::Sampler::Create(data::SizesOf(train_data_->rows()), SamplerOptionsOf(config_));
  PPFT_RETURN_IF_ERROR(invalid(sampler.status()));
  sampler_.emplace(*std::move(sampler));
  if (!config_.eval_tokens.has_value()) return absl::OkStatus();

  absl::StatusOr<std::unique_ptr<TokenData>> eval = TokenData::Open(config_.eval_tokens->path, model_config_.vocab_size);
  PPFT_RETURN_IF_ERROR(invalid(eval.status()));
  eval_data_ = *std::move(eval);
  absl::StatusOr<std::vector<data::Microbatch>> all = data::EvaluationPlan(data::SizesOf(eval_data_->rows()), SamplerOptionsOf(config_));
  PPFT_RETURN_IF_ERROR(invalid(all.status()));
  for (size_t i = 0; i < all->size(); ++i) {
    eval_targets_ += (*all)[i].targets;
    if (static_cast<int>(i) % plan().data_parallel_size == config_.me().replica) eval_plan_.push_back((*all)[i]);
  }
  const auto rounds_up = [](int64_t count, int64_t unit) { return (count + unit - 1) / unit; };
  const int64_t per_pass = plan().microbatches_per_pass;
  const int64_t passes = rounds_up(rounds_up(static_cast<int64_t>(all->size()), plan().data_parallel_size), per_pass);
  // A window bounds how many passes are on their way at once.
  eval_window_ = static_cast<int>(std::min<int64_t>(passes, 4 * plan().pipeline_parallel_size));
  eval_plan_.resize(static_cast<size_t>(rounds_up(passes, eval_window_) * eval_window_ * per_pass));
  PPFT_ASSIGN_OR_RETURN(const std::vector<pipeline::Program> forward,
                        pipeline::BuildForwardOnly(plan().pipeline_parallel_size, plan().virtual_stages, eval_window_));
  PPFT_ASSIGN_OR_RETURN(std::vector<pipeline::Program> lowered, pipeline::Lower(forward, mesh_.num_stages()));
  eval_program_ = std::move(lowered[static_cast<size_t>(config_.me().pipeline_rank)]);
  return absl::OkStatus();
}

absl::Status Trainer::LoadStages() {
  base_ = SourceOfTensors(config_.tensors, &activity_);
  for (const int stage : config_.me().stages) {
    activity_.Enter(Section::kLoading);
    absl::StatusOr<std::unique_ptr<StageModel>> model = factory_(model_config_, OptionsOf(stage), base_);
    PPFT_RETURN_IF_ERROR(ModelInvalid(model.status()));
    stages_[stage] = *std::move(model);
  }
  return absl::OkStatus();
}

absl::Status Trainer::Connect(TcpListener listener, const std::vector<std::string>& endpoints) {
  activity_.Enter(Section::kConnecting);
  const int size = mesh_.num_ranks();
  if (static_cast<int>(endpoints.size()) != size) return absl::InvalidArgumentError(absl::StrCat(endpoints.size(), " endpoints for ", size, " ranks"));
  if (size > 1) {
    TcpOptions options;
    options.job_id = config_.job_id;
    options.epoch = config_.epoch;
    options.rank = config_.rank;
    options.size = size;
    options.stall_timeout = config_.stall_timeout;
    if (cuda_ != nullptr) options.peer_silence = kDevicePeerSilence;
    options.connect_timeout = std::max(config_.stall_timeout, kPeersLoad);
    // All that a step can leave unclaimed or unsent, so that the order of a proven program never waits for room.
    options.ring_frames = 16 + 2 * std::max(plan().num_microbatches, eval_window_) * plan().virtual_stages;
    const int pp = plan().pipeline_parallel_size;
    std::vector<Link> links;
    for (int peer = 0; peer < size; ++peer) {
      if (peer == config_.rank) continue;
      links.push_back({peer, Channel::kControl});
      const bool same_replica = mesh_.ReplicaOf(peer) == config_.me().replica;
      const int distance = (mesh_.PipelineRankOf(peer) - config_.me().pipeline_rank + pp) % pp;
      if (cuda_ == nullptr && same_replica && (distance == 1 || distance == pp - 1)) {
        links.push_back({peer, Channel::kActivations});
        links.push_back({peer, Channel::kGradients});
      }
    }
    PPFT_ASSIGN_OR_RETURN(transport_, ConnectTcp(std::move(listener), options, endpoints, links));
    if (cuda_ != nullptr) PPFT_RETURN_IF_ERROR(ConnectDevices());
  }
  std::vector<int> everyone(static_cast<size_t>(size));
  std::iota(everyone.begin(), everyone.end(), 0);
  world_ = std::make_unique<Group>(transport_.get(), 0, everyone);
  replicas_ = std::make_unique<Group>(transport_.get(), 1 + config_.me().pipeline_rank, mesh_.ReplicaGroupOf(config_.rank));
  if (plan().data_parallel_size > 1 && plan().zero_stage >= 2) {
    if (cuda_ != nullptr) {
      exchange_ = std::make_unique<DeviceReplicaExchange>(device_replicas_.comm, device_replicas_.size, device_replicas_.index);
    } else {
      exchange_ = std::make_unique<HostReplicaExchange>(
          Group(transport_.get(), 1 + plan().pipeline_parallel_size + config_.me().pipeline_rank, mesh_.ReplicaGroupOf(config_.rank)));
    }
    for (StageModel* stage : Stages()) stage->Attach(exchange_.get());
  }
  interpreter_ = std::make_unique<Interpreter>(config_.rank, mesh_, StageMap(), model_config_.hidden_size, compute_, transport_.get(), &activity_,
                                               cuda_ != nullptr ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU));
  return LoadAdapterState();
}

absl::Status Trainer::ConnectDevices() {
  const RankSpec& me = config_.me();
  const int pp = plan().pipeline_parallel_size;
  DeviceTransportOptions options;
  options.group = mesh_.ReplicaGroupOf(config_.rank);
  options.sends_held = static_cast<size_t>(pp) + 1;
  // Stage s sends activations to the rank of s + 1 and takes gradients from it; with virtual stages the last rank sends to the first.
  std::set<std::pair<int, int>> down;  // pairs of ranks
  for (int stage = 0; stage + 1 < mesh_.num_stages() && pp > 1; ++stage) {
    const int from = mesh_.RankOfStage(me.replica, stage);
    const int to = mesh_.RankOfStage(me.replica, stage + 1);
    if (from == config_.rank || to == config_.rank) down.insert({from, to});
  }
  for (const auto& [from, to] : down) {
    options.links.push_back({Channel::kActivations, from, to});
    options.links.push_back({Channel::kGradients, to, from});
  }
  PPFT_ASSIGN_OR_RETURN(std::unique_ptr<DeviceTransport> devices, DeviceTransport::Connect(std::move(transport_), &cuda_->CommsOf(0), options));
  device_replicas_ = {devices->group(), devices->group_index(), plan().data_parallel_size};
  transport_ = std::move(devices);
  return absl::OkStatus();
}

void Trainer::LogHeldBytes() {
  HeldBytes held;
  for (StageModel* stage : Stages()) {
    const HeldBytes one = stage->held_bytes();
    held.weights += one.weights;
    held.masters += one.masters;
    held.gradients += one.gradients;
  }
  Log(absl::StrFormat("holds %d bytes of weights, %d of masters, %d of gradients, %d of moments (zero_stage %d, %d replicas)", held.weights, held.masters,
                      held.gradients, adapter_->moment_bytes(), plan().zero_stage, plan().data_parallel_size));
}

absl::Status Trainer::LoadAdapterState() {
  activity_.Enter(Section::kLoading);
  if (cuda_ != nullptr) {
    PPFT_ASSIGN_OR_RETURN(adapter_, DeviceAdapterState::Create(config_.optimizer, plan().zero_stage, Stages(), cuda_, device_replicas_, exchange_.get()));
  } else {
    PPFT_ASSIGN_OR_RETURN(adapter_, HostAdapterState::Create(config_.optimizer, plan().zero_stage, Stages(), replicas_.get(), exchange_.get()));
  }
  LogHeldBytes();
  if (config_.resume.has_value()) return RestoreCheckpoint();
  if (config_.init_adapter.empty()) return absl::OkStatus();
  std::vector<FileOnDisk> tensors;
  for (const FileOnDisk& file : config_.init_adapter) {
    if (file.name != "adapter_config.json") tensors.push_back(file);
  }
  const auto invalid = [](const absl::Status& status) {
    return WithReason(Annotate(status, "init_adapter"), "MODEL_INVALID", "USER",
                      "use an adapter with this job's r and target_modules that was trained on this model");
  };
  absl::StatusOr<TensorSource> source = SourceOfFiles(PathsOf(tensors));
  PPFT_RETURN_IF_ERROR(invalid(source.status()));
  return invalid(adapter_->LoadMasters(*source));
}

absl::Status Trainer::RestoreCheckpoint() {
  const TrainingState& saved = *config_.resume;
  const std::string what = absl::StrCat("checkpoint of step ", saved.step);
  if (saved.data_sha256 != config_.train_tokens.sha256) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(what, ": it belongs to other training data")), "DATASET_INVALID", "USER",
                      "submit the job again: it begins anew with its data");
  }
  if (saved.model_sha256 != Sha256Hex(config_.model_config)) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(what, ": it belongs to another base model")), "MODEL_INVALID", "USER",
                      "submit the job again: it begins anew with its model");
  }
  absl::StatusOr<TensorSource> source = SourceOfFiles(PathsOf(config_.resume_files));
  PPFT_RETURN_IF_ERROR(OpenedCheckpoint(Annotate(source.status(), what)));
  PPFT_RETURN_IF_ERROR(ReadCheckpoint(Annotate(adapter_->Restore(*source), what)));
  state_ = saved;
  scaler_.Restore(saved.loss_scale, saved.good_steps, saved.hysteresis_left);
  checkpoint_step_ = saved.step;
  activity_.SetStep(saved.step);
  Log(absl::StrCat("goes on after step ", saved.step));
  if (!config_.load_best_model_at_end || !has_eval() || saved.best_step == 0) return absl::OkStatus();
  if (saved.best_step == saved.step) {
    adapter_->KeepBest();
    return absl::OkStatus();
  }
  if (!config_.best.has_value() || config_.best->step != saved.best_step) {
    return WithReason(absl::NotFoundError(absl::StrCat(what, ": the best one, of step ", saved.best_step, ", was not given with it")), "INTERNAL",
                      "INFRASTRUCTURE", "look at the coordinator's log");
  }
  const std::string best_what = absl::StrCat("best checkpoint, of step ", saved.best_step);
  absl::StatusOr<TensorSource> best = SourceOfFiles(PathsOf(config_.best_files));
  PPFT_RETURN_IF_ERROR(OpenedCheckpoint(Annotate(best.status(), best_what)));
  return ReadCheckpoint(Annotate(adapter_->LoadBestFrom(*best), best_what));
}

}  // namespace ppft::trainer
