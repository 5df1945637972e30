// What a rank is told to do, as plain values: the trainer's side of proto/ppft/v1/trainer.proto (Start), free of protobuf so that it can meet torch.
// Filled by worker/trainer/wire.h; the comments there and in the contract hold here too.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/pipeline/action.h"
#include "worker/trainer/optim/adamw.h"
#include "worker/trainer/optim/loss_scaler.h"
#include "worker/trainer/optim/schedule.h"

namespace ppft::trainer {

// The part of a trainer's state that is not a tensor. Equal on all ranks.
struct TrainingState {
  int64_t step = 0;
  int64_t tokens_seen = 0;
  int64_t supervised_tokens = 0;
  double loss_scale = 1;
  int64_t skipped_steps = 0;
  int good_steps = 0;
  int hysteresis_left = 0;
  std::optional<double> best_metric;
  int64_t best_step = 0;
  int evaluations_without_improvement = 0;
  int64_t last_eval_step = -1;
  std::string data_sha256;
  std::string model_sha256;
};

struct FileOnDisk {
  std::string path;
  std::string name;
  std::string sha256;
  int64_t size_bytes = 0;
};

// The raw bytes of one tensor of the base model.
struct BaseTensor {
  std::string name;
  std::string dtype;  // F32 | BF16 | F16
  std::vector<int64_t> shape;
  std::string path;
};

struct StageSpec {
  int stage = 0;
  int first_layer = 0;
  int num_layers = 0;
  bool has_embedding = false;
  bool has_head = false;
};

struct RankSpec {
  int rank = 0;
  int replica = 0;
  int pipeline_rank = 0;
  std::vector<int> stages;  // ascending
  std::string program;
  std::string device;         // "cpu:0", "cuda:1" on its worker
  int64_t peak_bytes = 0;     // the plan's estimate
  int64_t runtime_bytes = 0;  // what of it does not pass through the allocator
};

struct PlanSpec {
  int data_parallel_size = 1;
  int pipeline_parallel_size = 1;
  int virtual_stages = 1;
  int num_microbatches = 1;
  int zero_stage = 0;
  std::string compute = "fp32";
  int64_t total_steps = 0;
  int threads_per_rank = 1;
  int64_t microbatch_tokens = 0;
  int microbatches_per_pass = 1;
  std::vector<StageSpec> stages;  // by index
  std::vector<RankSpec> ranks;    // by index

  int num_passes() const { return (num_microbatches + microbatches_per_pass - 1) / microbatches_per_pass; }  // per step and replica
  int64_t pass_tokens() const { return microbatch_tokens * microbatches_per_pass; }                          // capacity
};

struct AdapterOptions {
  int r = 16;
  double scale = 2;
  double dropout = 0;
  std::vector<std::string> target_modules;
};

struct DataOptions {
  int64_t sequence_len = 1024;
  int64_t micro_batch_size = 4;
  bool sample_packing = true;
  bool shuffle = true;
};

struct EvaluationOptions {
  int64_t eval_steps = 0;
  bool eval_on_start = false;
  std::optional<int> early_stopping_patience;
};

struct TrainerConfig {
  std::string job_id;
  int64_t epoch = 0;
  int rank = 0;
  uint64_t seed = 42;
  PlanSpec plan;
  std::string model_config;  // config.json
  std::vector<BaseTensor> tensors;
  std::string activation_checkpointing = "none";  // none | selective | full
  bool cuda_graphs = true;                        // of a GPU's passes, where they can be captured
  AdapterOptions adapter;
  DataOptions data;
  FileOnDisk train_tokens;
  std::optional<FileOnDisk> eval_tokens;
  std::vector<FileOnDisk> init_adapter;
  std::optional<TrainingState> resume;
  std::vector<FileOnDisk> resume_files;
  std::optional<TrainingState> best;
  std::vector<FileOnDisk> best_files;
  LearningRateSchedule schedule;
  AdamWOptions optimizer;
  double max_grad_norm = 1;
  LossScalerOptions loss_scaler;
  int64_t logging_steps = 1;
  EvaluationOptions evaluation;
  int64_t save_steps = 0;
  bool load_best_model_at_end = false;
  bool write_merged = false;
  std::string merge_dtype = "float32";
  bool verify = true;
  absl::Duration stall_timeout = absl::Seconds(300);
  std::string directory;
  std::string listen_address;
  std::string beat_path;

  const RankSpec& me() const { return plan.ranks[static_cast<size_t>(rank)]; }
};

// INVALID_ARGUMENT if the plan contradicts itself: indices, stages, sizes.
absl::Status CheckConfig(const TrainerConfig& config);

// INVALID_ARGUMENT unless a rank's program goes forward through each pass of a step: with fewer, micro-batches would be left out without a sign.
absl::Status CheckPasses(const pipeline::Program& program, const PlanSpec& plan);

}  // namespace ppft::trainer
