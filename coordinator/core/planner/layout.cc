#include "coordinator/core/planner/layout.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/format.h"
#include "common/base/status.h"
#include "common/model/cost.h"
#include "common/pipeline/lowering.h"
#include "common/pipeline/partition.h"
#include "common/spec/spec.h"
#include "coordinator/core/planner/memory.h"

namespace ppft::coordinator {
namespace {

using pipeline::ScheduleKind;

// A plan carries its programs as text, a directive to a worker carries the plan once per rank there, and a message has to stay below 4 MiB: with all
// ranks on one worker, about so many bytes may be programs.
constexpr int64_t kMaxProgramBytes = int64_t{3} << 20;

// Micro-batches are merged up to passes of so many tokens. Below it a GPU waits for its small kernels (72k tokens/s in passes of 512 tokens, 92k in passes of
// 4096, 1B shape on an H200); above it its products gain nothing more, and the memory for activations only grows.
constexpr int64_t kMergedTokens = 4096;

// Row offsets of a micro-batch are 32-bit.
constexpr int64_t kMaxMicrobatchTokens = (int64_t{1} << 31) - 1;

int DataParallelSize(const v1::JobSpec& spec) { return std::max(1, spec.parallel().data_parallel_size()); }
int VirtualStages(const v1::JobSpec& spec) { return std::max(1, spec.parallel().virtual_stages()); }

// The size that the spec names, itself or by the length of layers_per_stage; unset for auto.
std::optional<int> NamedPipelineSize(const v1::JobSpec& spec) {
  if (spec.parallel().pipeline_parallel_size() > 0) return spec.parallel().pipeline_parallel_size();
  if (spec.parallel().layers_per_stage_size() > 0) return std::max(1, spec.parallel().layers_per_stage_size() / VirtualStages(spec));
  return std::nullopt;
}

int NumMicrobatches(const v1::JobSpec& spec) {
  if (!spec.training().has_global_batch_size()) return spec.training().gradient_accumulation_steps();
  return static_cast<int>(spec.training().global_batch_size() / (int64_t{1} * std::max(1, spec.training().micro_batch_size()) * DataParallelSize(spec)));
}

// auto: interleaved when there are virtual stages, 1F1B when every rank gets work in its steady phase, else GPipe.
ScheduleKind ResolveSchedule(const v1::JobSpec& spec, int pipeline_size) {
  if (absl::StatusOr<ScheduleKind> named = pipeline::ParseScheduleKind(spec.parallel().schedule()); named.ok()) return *named;
  if (VirtualStages(spec) > 1) return ScheduleKind::kInterleaved1F1B;
  return NumMicrobatches(spec) >= pipeline_size ? ScheduleKind::k1F1B : ScheduleKind::kGPipe;
}

// Micro-batches that a plan of this size has room for.
int64_t MaxMicrobatches(const v1::JobSpec& spec, int64_t pipeline_size) {
  const int64_t ranks = pipeline_size * DataParallelSize(spec);
  const int64_t bytes_per_stage = pipeline_size == 1 ? 16 : 68;  // two compute actions; and four transfers
  return std::max<int64_t>(1, kMaxProgramBytes / (bytes_per_stage * ranks * VirtualStages(spec) * ranks));
}

constexpr char kPipelineSize[] = "parallel.pipeline_parallel_size";
constexpr char kDataSize[] = "parallel.data_parallel_size";
constexpr char kVirtualStages[] = "parallel.virtual_stages";
constexpr char kLayersPerStage[] = "parallel.layers_per_stage";
constexpr char kMicrobatch[] = "training.micro_batch_size";
constexpr char kAccumulation[] = "training.gradient_accumulation_steps";
constexpr char kGlobalBatch[] = "training.global_batch_size";

class Violations {
 public:
  explicit Violations(const std::set<std::string>& wrong) : wrong_(wrong) {}

  bool AreSound(std::initializer_list<const char*> fields) const {
    return std::none_of(fields.begin(), fields.end(), [&](const char* field) { return wrong_.count(field) > 0; });
  }
  bool SizeIsSound(const v1::JobSpec& spec) const {
    return AreSound({kPipelineSize, kVirtualStages}) && (spec.parallel().pipeline_parallel_size() > 0 || AreSound({kLayersPerStage}));
  }
  bool MicrobatchesAreSound() const { return AreSound({kAccumulation, kGlobalBatch, kMicrobatch, kDataSize}); }

  template <typename... Parts>
  void Add(absl::string_view field, const Parts&... parts) {
    v1::Violation violation;
    violation.set_field(std::string(field));
    violation.set_message(absl::StrCat(parts...));
    list_.push_back(std::move(violation));
  }
  std::vector<v1::Violation> Take() { return std::move(list_); }

 private:
  const std::set<std::string>& wrong_;
  std::vector<v1::Violation> list_;
};

void CheckBatch(const v1::JobSpec& spec, const model::ModelConfig& config, Violations& violations) {
  const v1::TrainingSpec& training = spec.training();
  if (const int64_t tokens = training.micro_batch_size() * SequenceLength(spec, config);
      tokens > kMaxMicrobatchTokens && violations.AreSound({kMicrobatch, "data.sequence_len"})) {
    violations.Add("training.micro_batch_size", "a micro-batch of ", training.micro_batch_size(), " x ", SequenceLength(spec, config),
                   " tokens is larger than ", kMaxMicrobatchTokens, ": lower micro_batch_size");
  }
  if (training.micro_batch_size() < 1 && violations.AreSound({kMicrobatch})) {
    violations.Add("training.micro_batch_size", training.micro_batch_size(), " must be at least 1");
  }
  if (!violations.MicrobatchesAreSound()) return;
  if (training.has_global_batch_size()) {
    const int64_t unit = int64_t{1} * std::max(1, training.micro_batch_size()) * DataParallelSize(spec);
    if (training.global_batch_size() < unit || training.global_batch_size() % unit != 0) {
      violations.Add("training.global_batch_size", training.global_batch_size(), " is no multiple of micro_batch_size (", training.micro_batch_size(),
                     ") x data_parallel_size (", DataParallelSize(spec), "): use a multiple of ", unit);
    }
  } else if (training.gradient_accumulation_steps() < 1) {
    violations.Add("training.gradient_accumulation_steps", training.gradient_accumulation_steps(), " must be at least 1");
  }
}

void CheckSchedule(const v1::JobSpec& spec, int pipeline_size, Violations& violations) {
  if (!violations.AreSound({"parallel.schedule", kVirtualStages})) return;
  const ScheduleKind kind = ResolveSchedule(spec, pipeline_size);
  const int v = VirtualStages(spec);
  if (kind == ScheduleKind::kInterleaved1F1B && v == 1) {
    violations.Add("parallel.virtual_stages", "schedule interleaved_1f1b needs at least 2 virtual stages: set virtual_stages: 2 or schedule: 1f1b");
  }
  if (kind != ScheduleKind::kInterleaved1F1B && v > 1) {
    violations.Add("parallel.virtual_stages", v, " virtual stages need schedule: interleaved_1f1b, not ", ToString(kind));
  }
  if (!violations.SizeIsSound(spec) || !violations.MicrobatchesAreSound()) return;
  const int m = NumMicrobatches(spec), least = MinMicrobatches(kind, pipeline_size);
  if (m >= 1 && m < least) {
    const bool global = spec.training().has_global_batch_size();
    const int64_t unit = int64_t{1} * spec.training().micro_batch_size() * DataParallelSize(spec);
    violations.Add(global ? "training.global_batch_size" : "training.gradient_accumulation_steps", "too few micro-batches for ", ToString(kind),
                   ": gradient_accumulation_steps (", m, ") must be at least pipeline_parallel_size (", pipeline_size, "): raise ",
                   global ? absl::StrCat("global_batch_size to at least ", least * unit) : absl::StrCat("gradient_accumulation_steps to at least ", least),
                   ", or use fewer stages");
  }
}

void CheckLayersPerStage(const v1::JobSpec& spec, const model::ModelConfig& config, int pipeline_size, Violations& violations) {
  const auto& layers = spec.parallel().layers_per_stage();
  if (layers.empty() || !violations.AreSound({kLayersPerStage})) return;
  const int num_stages = pipeline_size * VirtualStages(spec);
  const std::string text = absl::StrCat("[", absl::StrJoin(layers, ", "), "]");
  if (layers.size() != num_stages && violations.SizeIsSound(spec)) {
    violations.Add("parallel.layers_per_stage", text, " has ", Counted(layers.size(), "number"), " for ", Counted(num_stages, "stage"),
                   " (pipeline_parallel_size ", pipeline_size, " x virtual_stages ", VirtualStages(spec), "): give one number per stage");
  }
  if (std::any_of(layers.begin(), layers.end(), [](int n) { return n < 1; })) {
    violations.Add("parallel.layers_per_stage", text, " has a stage without a layer: every stage needs at least 1");
  }
  const int64_t sum = std::accumulate(layers.begin(), layers.end(), int64_t{0});
  if (sum != config.num_layers) {
    violations.Add("parallel.layers_per_stage", text, " adds up to ", sum, ", but the model has ", Counted(config.num_layers, "layer"),
                   ": the numbers must add up to ", config.num_layers);
  }
}

model::LoraShape LoraOf(const v1::JobSpec& spec) {
  return {spec.adapter().r(), {spec.adapter().target_modules().begin(), spec.adapter().target_modules().end()}};
}

// What `spec` asks to make again in backward; none where that is left to the planner.
model::ActivationCheckpointing CheckpointingOf(const v1::JobSpec& spec) {
  return model::ParseActivationCheckpointing(spec.parallel().activation_checkpointing()).value_or(model::ActivationCheckpointing::kNone);
}

model::StageMemoryOptions MemoryOptionsOf(const v1::JobSpec& spec, const model::ModelConfig& config, absl::string_view kind, int64_t compute_bytes,
                                          const PlanFacts& facts, int microbatches_per_pass) {
  model::StageMemoryOptions options;
  options.cuda = kind == "cuda";
  options.compute_bytes = compute_bytes;
  options.longest_document = SequenceLength(spec, config);
  if (facts.longest_row > 0) options.longest_document = std::min(options.longest_document, facts.longest_row);
  // Packed micro-batches are filled up, and a GPU makes room for full ones at once; others hold micro_batch_size rows, however short.
  const bool full = options.cuda || spec.data().sample_packing();
  options.tokens = microbatches_per_pass * spec.training().micro_batch_size() * (full ? SequenceLength(spec, config) : options.longest_document);
  options.targets = options.tokens;
  options.documents = microbatches_per_pass * (spec.data().sample_packing() && facts.documents > 0 ? facts.documents : spec.training().micro_batch_size());
  options.flash = facts.flash;
  options.deterministic = facts.deterministic;
  options.dropout = spec.adapter().lora_dropout() > 0;
  options.evaluates = spec.data().val_set_size() > 0 || spec.data().test_datasets_size() > 0;
  options.checkpointing = CheckpointingOf(spec);
  const bool sparing = options.checkpointing == model::ActivationCheckpointing::kFull;
  options.head_rows = !options.cuda ? model::kCpuHeadRows : sparing ? model::kCudaSmallHeadRows : model::kCudaHeadRows;
  options.zero_stage = spec.parallel().zero_stage();
  options.replicas = DataParallelSize(spec);
  return options;
}

bool Merges(const v1::JobSpec& spec) {
  const auto& formats = spec.output().formats();
  return std::find(formats.begin(), formats.end(), "merged") != formats.end();
}

struct Costs {
  model::Flops layer;
  model::Flops head;
  double embedding = 0;
};

// FLOPs on a CPU, where products take nearly all of the time, and in fp32; time on a GPU.
Costs CostsOf(const v1::JobSpec& spec, const model::ModelConfig& config, int64_t tokens, double supervised_ratio, bool on_gpu) {
  const int64_t targets = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(tokens) * supervised_ratio));
  Costs costs;
  costs.layer = (on_gpu ? model::LayerTimeOnGpu : model::LayerFlops)(config, LoraOf(spec), tokens, SequenceLength(spec, config));
  const model::ActivationCheckpointing checkpointing = CheckpointingOf(spec);
  if (checkpointing == model::ActivationCheckpointing::kFull) costs.layer.backward += costs.layer.forward;
  if (checkpointing == model::ActivationCheckpointing::kSelective) {
    costs.layer.backward += 4.0 * static_cast<double>(tokens) * static_cast<double>(config.hidden_size) * static_cast<double>(config.intermediate_size);
  }
  costs.head = (on_gpu ? model::HeadTimeOnGpu : model::HeadFlops)(config, targets);
  // A copy of one row per token; counted as one operation per element.
  costs.embedding = static_cast<double>(tokens) * static_cast<double>(config.hidden_size);
  return costs;
}

absl::StatusOr<std::vector<int>> CutLayers(const v1::JobSpec& spec, const model::ModelConfig& config, const Costs& costs, int num_stages) {
  if (spec.parallel().layers_per_stage_size() > 0) {
    return std::vector<int>(spec.parallel().layers_per_stage().begin(), spec.parallel().layers_per_stage().end());
  }
  const pipeline::ModelCost cost{std::vector<double>(config.num_layers, costs.layer.forward + costs.layer.backward), costs.embedding,
                                 costs.head.forward + costs.head.backward};
  return pipeline::PartitionLayers(cost, num_stages);
}

std::vector<v1::StagePlan> MakeStages(const v1::JobSpec& spec, const model::ModelConfig& config, const Costs& costs, const std::vector<int>& layers_per_stage,
                                      const model::StageMemoryOptions& options) {
  const model::LoraShape lora = LoraOf(spec);
  std::vector<v1::StagePlan> stages;
  int first_layer = 0;
  for (size_t s = 0; s < layers_per_stage.size(); ++s) {
    const int num_layers = layers_per_stage[s];
    v1::StagePlan stage;
    stage.set_stage(static_cast<int>(s));
    stage.set_first_layer(first_layer);
    stage.set_num_layers(num_layers);
    stage.set_has_embedding(s == 0);
    stage.set_has_head(s + 1 == layers_per_stage.size());
    stage.set_forward_cost(num_layers * costs.layer.forward + (stage.has_embedding() ? costs.embedding : 0) + (stage.has_head() ? costs.head.forward : 0));
    stage.set_backward_cost(num_layers * costs.layer.backward + (stage.has_head() ? costs.head.backward : 0));
    const model::StageMemory memory = StageMemoryOf(config, lora, stage, options);
    stage.set_weight_bytes(memory.weights);
    stage.set_adapter_bytes(memory.masters + memory.gradients + memory.moments);
    stage.set_activation_bytes(memory.kept);
    first_layer += num_layers;
    stages.push_back(std::move(stage));
  }
  return stages;
}

}  // namespace

int64_t SequenceLength(const v1::JobSpec& spec, const model::ModelConfig& config) {
  if (spec.data().sequence_len() > 0) return spec.data().sequence_len();
  return std::min<int64_t>(1024, config.max_position_embeddings);
}

int64_t Layout::largest_rank_bytes() const { return peak_bytes.empty() ? 0 : *std::max_element(peak_bytes.begin(), peak_bytes.end()); }

std::vector<v1::Violation> CheckLayout(const v1::JobSpec& spec, const model::ModelConfig& config, const std::set<std::string>& wrong) {
  Violations violations(wrong);
  CheckBatch(spec, config, violations);
  const std::optional<int> named = NamedPipelineSize(spec);
  const int pipeline_size = named.value_or(1);
  const int64_t num_stages = int64_t{1} * pipeline_size * VirtualStages(spec);
  const bool size_is_sound = violations.SizeIsSound(spec);
  if (size_is_sound && num_stages > config.num_layers) {
    violations.Add(named ? "parallel.pipeline_parallel_size" : "parallel.virtual_stages", num_stages, " stages (pipeline_parallel_size ", pipeline_size,
                   " x virtual_stages ", VirtualStages(spec), ") are more than the model's ", Counted(config.num_layers, "layer"), ": use at most ",
                   Counted(config.num_layers, "stage"));
  } else if (size_is_sound && violations.MicrobatchesAreSound() && NumMicrobatches(spec) > MaxMicrobatches(spec, pipeline_size)) {
    violations.Add("training.gradient_accumulation_steps", NumMicrobatches(spec), " micro-batches per step are more than the ",
                   MaxMicrobatches(spec, pipeline_size), " that a plan for ", pipeline_size * DataParallelSize(spec),
                   " ranks holds: use a larger micro_batch_size with fewer gradient_accumulation_steps");
  }
  CheckSchedule(spec, pipeline_size, violations);
  CheckLayersPerStage(spec, config, pipeline_size, violations);
  return violations.Take();
}

std::vector<int> PipelineSizes(const v1::JobSpec& spec, const model::ModelConfig& config, int max_size) {
  if (const std::optional<int> named = NamedPipelineSize(spec)) return {*named};
  std::vector<int> sizes = {1};
  const int m = NumMicrobatches(spec);
  for (int size = 2; size <= max_size && size * VirtualStages(spec) <= config.num_layers; ++size) {
    if (m >= MinMicrobatches(ResolveSchedule(spec, size), size) && m <= MaxMicrobatches(spec, size)) sizes.push_back(size);
  }
  return sizes;
}

int MostMicrobatchesPerPass(const v1::JobSpec& spec, const model::ModelConfig& config, int pipeline_size, absl::string_view kind) {
  // Passes of one stage alone: with several, fewer passes are a longer bubble. On a CPU small products are as fast as large ones.
  if (spec.parallel().merge_micro_batches() == "off" || kind != "cuda" || pipeline_size > 1) return 1;
  const int64_t tokens = spec.training().micro_batch_size() * SequenceLength(spec, config);
  return static_cast<int>(std::clamp<int64_t>(kMergedTokens / std::max<int64_t>(1, tokens), 1, std::max(1, NumMicrobatches(spec))));
}

absl::StatusOr<Layout> MakeLayout(const v1::JobSpec& spec, const model::ModelConfig& config, int pipeline_size, absl::string_view kind, const PlanFacts& facts,
                                  int microbatches_per_pass) {
  v1::JobSpec resolved = spec;
  resolved.mutable_parallel()->set_pipeline_parallel_size(pipeline_size);
  if (const std::vector<v1::Violation> violations = CheckLayout(resolved, config); !violations.empty()) {
    return absl::InvalidArgumentError(absl::StrJoin(
        violations, "\n", [](std::string* out, const v1::Violation& violation) { absl::StrAppend(out, violation.field(), ": ", violation.message()); }));
  }
  Layout layout;
  layout.data_parallel_size = DataParallelSize(spec);
  layout.pipeline_size = pipeline_size;
  layout.virtual_stages = VirtualStages(spec);
  layout.schedule = ResolveSchedule(spec, pipeline_size);
  layout.num_microbatches = NumMicrobatches(spec);
  layout.microbatches_per_pass = std::clamp(microbatches_per_pass, 1, layout.num_microbatches);
  layout.compute = spec::ComputeOn(spec.precision().compute(), kind);
  layout.microbatch_tokens = spec.training().micro_batch_size() * SequenceLength(spec, config);
  layout.checkpointing = std::string(model::WordOf(CheckpointingOf(spec)));
  if (kind == "cuda") {
    // Attention's tables of documents count elements in 32 bits (worker/trainer/cuda/documents.cc).
    const int64_t most = std::numeric_limits<int32_t>::max() / (config.query_size() + spec.adapter().r());
    if (layout.microbatch_tokens > most) {
      return absl::InvalidArgumentError(absl::StrCat("training.micro_batch_size: a micro-batch of ", layout.microbatch_tokens, " tokens is more than the ",
                                                     most, " that attention on a GPU takes of this model: lower micro_batch_size"));
    }
  }
  const model::StageMemoryOptions memory = MemoryOptionsOf(spec, config, kind, ComputeBytes(layout.compute), facts, layout.microbatches_per_pass);
  const int num_stages = pipeline_size * layout.virtual_stages;

  const Costs costs =
      CostsOf(spec, config, layout.microbatch_tokens * layout.microbatches_per_pass, facts.supervised_ratio, kind == "cuda" && layout.compute != "fp32");
  PPFT_ASSIGN_OR_RETURN(const std::vector<int> layers_per_stage, CutLayers(spec, config, costs, num_stages));
  layout.stages = MakeStages(spec, config, costs, layers_per_stage, memory);
  layout.head_layers = (costs.head.forward + costs.head.backward) / (costs.layer.forward + costs.layer.backward);

  PPFT_ASSIGN_OR_RETURN(const std::vector<pipeline::Program> compute,
                        pipeline::BuildSchedule({layout.schedule, pipeline_size, layout.virtual_stages, layout.num_passes()}));
  PPFT_ASSIGN_OR_RETURN(layout.programs, pipeline::Lower(compute, num_stages));
  pipeline::SimulationOptions options;
  std::vector<double> rank_costs(pipeline_size, 0.0);
  for (const v1::StagePlan& stage : layout.stages) {
    options.forward_cost.push_back(stage.forward_cost());
    options.backward_cost.push_back(stage.backward_cost());
    rank_costs[stage.stage() % pipeline_size] += stage.forward_cost() + stage.backward_cost();
  }
  layout.imbalance = pipeline::Imbalance(rank_costs);
  PPFT_ASSIGN_OR_RETURN(layout.simulation, pipeline::Simulate(layout.programs, {num_stages, layout.num_passes()}, options));
  const model::LoraShape lora = LoraOf(spec);
  for (int rank = 0; rank < pipeline_size; ++rank) {
    layout.memory.push_back(
        RankMemory({config, lora, memory, layout.stages, layout.programs[rank], layout.simulation, rank, Merges(spec), spec.output().verify()}));
    layout.peak_bytes.push_back(TotalBytes(layout.memory.back()));
  }
  return layout;
}

}  // namespace ppft::coordinator
