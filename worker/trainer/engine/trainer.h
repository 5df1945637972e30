// One rank's whole run: load, connect, train, export. The step loop is here; what it is made of lies in the files beside it.
//
// Thread: one, but for the statistics that a thread of this class sends. All decisions (skip, stop, best, checkpoint) are functions of values that all ranks
// gather, so that no rank has to be told.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/data/batch_plan.h"
#include "common/model/config.h"
#include "common/pipeline/action.h"
#include "common/pipeline/mesh.h"
#include "worker/trainer/beat.h"
#include "worker/trainer/comm/collectives.h"
#include "worker/trainer/comm/device/device_transport.h"
#include "worker/trainer/comm/tcp_transport.h"
#include "worker/trainer/cuda/plugin.h"
#include "worker/trainer/engine/activity.h"
#include "worker/trainer/engine/adapter_state.h"
#include "worker/trainer/engine/batches.h"
#include "worker/trainer/engine/config.h"
#include "worker/trainer/engine/device_adapter_state.h"
#include "worker/trainer/engine/interpreter.h"
#include "worker/trainer/engine/report.h"
#include "worker/trainer/engine/tracer.h"
#include "worker/trainer/model/stage_model.h"
#include "worker/trainer/optim/loss_scaler.h"

namespace ppft::trainer {

// StageModel::Create, or a stand-in in tests.
using StageFactory =
    std::function<absl::StatusOr<std::unique_ptr<StageModel>>(const model::ModelConfig& config, const StageOptions& options, const TensorSource& source)>;

class Trainer {
 public:
  // `reporter` and `beat` (may be null) outlive this object.
  // `cuda` is the plugin, in use on this thread, where the rank's device is a GPU (its only visible one); null on the CPU.
  Trainer(TrainerConfig config, Reporter* reporter, Beat* beat, CudaRuntime* cuda = nullptr, StageFactory factory = StageModel::Create);
  ~Trainer();

  // Model, data, checkpoint. Errors carry their reason (failure.h).
  absl::Status Load();
  // `endpoints` by rank.
  absl::Status Connect(TcpListener listener, const std::vector<std::string>& endpoints);
  // Trains from where it stands and exports. OK: everything was reported.
  absl::Status Run();
  // Before Run: whose steps to record. It outlives this object; without it none are.
  void FollowOrders(const TraceOrders* orders) { tracer_.emplace(orders, &activity_, reporter_); }
  // The peers fail with this rank's name; any thread.
  void Abort(const absl::Status& cause);

  int64_t step() const { return activity_.step(); }

 private:
  // What a step gathers over all ranks.
  struct StepSums {
    double loss_sum = 0;
    std::vector<double> squares;  // of the gradients, per parameter of the model in model order
  };

  absl::Status LoadData();
  absl::Status LoadStages();
  absl::Status LoadAdapterState();
  void LogHeldBytes();
  // Activations and gradients go from device to device from here on.
  absl::Status ConnectDevices();
  absl::Status RestoreCheckpoint();
  void StartStats();

  absl::Status Train();
  void RecordDeviceMemory();
  void LogPeakMemory();
  // The ranks' trace orders, before the first step.
  absl::Status GatherOrders();
  absl::Status TrainStep(int64_t step);
  absl::StatusOr<StepSums> GatherSums();
  // NUMERIC_DIVERGENCE that names the loss or the first parameter whose gradient is not finite; OK if all are.
  absl::Status CheckFinite(const StepSums& sums, const data::StepPlan& plan) const;
  // What ends the job when `finite` came at the smallest scale.
  absl::Status NoSmallerScale(const absl::Status& finite, double scale) const;
  // A failure that every rank finds in the same sums. They meet once more, so that none takes its links down before the others have read those sums.
  absl::Status FoundByAll(absl::Status failure);
  void ReportStep(const data::StepPlan& plan, double loss, double learning_rate, double grad_norm, bool skipped);
  void NoteSkipped(int64_t step, double scale, const absl::Status& reason);

  bool has_eval() const { return eval_data_ != nullptr; }
  bool EvalDue(int64_t step) const;
  bool StopsEarly() const;
  // Mean -log p over all targets of the evaluation rows; updates the best and the patience.
  absl::Status Evaluate(int64_t step, bool* new_best, std::optional<double>* eval_loss);
  absl::StatusOr<double> EvaluationLoss();
  // The last stage's, zero at first; undefined on other ranks.
  at::Tensor LossTotal() const;
  // What an aborted communicator throws, replaced by why it was aborted.
  absl::Status WithCause(const absl::Status& status) const;
  absl::Status TransportStatus() const { return transport_ == nullptr ? absl::OkStatus() : transport_->status(); }
  absl::Status WriteCheckpoint(bool best, const std::optional<double>& eval_loss);

  absl::Status Export();
  absl::Status WriteArtifacts(ExportWritten* written, std::string* adapter_path, std::string* merged_path);
  // Until all ranks are here, however long some of them write or verify.
  absl::Status AwaitAll();
  // Forward of the probe through the pipeline; logits [probe, vocab] on the last stage.
  absl::Status ProbeLogits(const std::vector<int32_t>& probe, at::Tensor* logits);
  std::vector<int32_t> Probe() const;  // the first tokens of the data
  // On the other replicas: takes part in the passes of replica 0's Verify that need all of them.
  absl::Status HelpVerify();
  // The last use of the trained model is over: its memory is free for what was read back.
  void DropTrainedModel();
  absl::Status Verify(const std::string& adapter_path, const std::string& merged_path, std::vector<Verification>* verifications);
  // How far a is from b at most: {absolute, relative to b's largest}. The last stage's, known to all of replica 0.
  absl::StatusOr<std::array<double, 2>> DifferenceToAll(const at::Tensor& a, const at::Tensor& b);
  absl::StatusOr<std::map<int, std::unique_ptr<StageModel>>> MergedStages(const std::string& merged_path);

  const PlanSpec& plan() const { return config_.plan; }
  bool is_reporter() const;  // replica 0's last stage
  // ZeRO 3: a stage goes forward only together with its replicas.
  bool shares_layers() const { return plan().zero_stage >= 3 && plan().data_parallel_size > 1; }
  StageOptions OptionsOf(int stage) const;
  std::vector<StageModel*> Stages() const;
  std::map<int, StageModel*> StageMap() const;
  // Of the whole model in model order: layer by layer, in each the modules with their A and B.
  size_t parameters_per_layer() const { return 2 * config_.adapter.target_modules.size(); }
  std::string ParameterName(size_t index) const;
  void FillState(int64_t step);
  void Log(const std::string& text) { reporter_->Log(Severity::kInfo, text); }

  // Constant after Load.
  const TrainerConfig config_;
  Reporter* const reporter_;
  CudaRuntime* const cuda_;
  const StageFactory factory_;
  const pipeline::Mesh mesh_;
  model::ModelConfig model_config_;
  at::ScalarType compute_ = at::kFloat;
  model::ActivationCheckpointing checkpointing_ = model::ActivationCheckpointing::kNone;
  pipeline::Program program_;
  pipeline::Program eval_program_;  // of eval_window_ passes
  int eval_window_ = 0;
  std::unique_ptr<TokenData> train_data_;
  std::unique_ptr<TokenData> eval_data_;
  std::vector<data::Microbatch> eval_plan_;  // of this replica, filled up with empty ones to whole windows: as many on all replicas
  int64_t eval_targets_ = 0;                 // of all replicas

  Activity activity_;
  std::optional<data::Sampler> sampler_;
  TensorSource base_;
  std::map<int, std::unique_ptr<StageModel>> stages_;
  std::unique_ptr<Transport> transport_;
  DeviceReplicas device_replicas_;
  std::atomic<int64_t> device_peak_bytes_{0};  // 0 on the CPU
  std::unique_ptr<Group> world_;
  std::unique_ptr<Group> replicas_;
  std::unique_ptr<ReplicaExchange> exchange_;  // zero_stage 2 and 3 over several replicas
  std::unique_ptr<AdapterState> adapter_;
  std::unique_ptr<Interpreter> interpreter_;
  const TraceOrders no_orders_;
  std::optional<Tracer> tracer_;
  LossScaler scaler_;
  TrainingState state_;
  int64_t next_pass_ = 1;
  int64_t checkpoint_step_ = -1;  // of the newest that this process wrote or read

  // Since the last step report.
  absl::Time reported_at_;
  int64_t reported_tokens_ = 0;
  std::vector<SkippedStep> skipped_;

  class StatsThread;
  std::unique_ptr<StatsThread> stats_;
};

}  // namespace ppft::trainer
