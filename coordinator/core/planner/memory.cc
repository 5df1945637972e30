#include "coordinator/core/planner/memory.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace ppft::coordinator {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
// A process with LibTorch loaded; a CUDA context with cuBLAS, NCCL and its kernels.
constexpr int64_t kCpuRuntimeBytes = 256 * kMiB;
constexpr int64_t kCudaRuntimeBytes = 1024 * kMiB;
// Rows of logits at a time, as fp32, once for the logits and once for their gradient.
constexpr int64_t kCpuHeadRows = 256;
constexpr int64_t kCudaHeadRows = 4096;

// Temporaries of one layer's backward: gradients of gate, up and their product, of q k v, and three hidden states.
int64_t LayerWorkspace(const model::ModelConfig& config, int64_t tokens, int64_t compute_bytes) {
  return tokens * compute_bytes * (3 * config.intermediate_size + config.query_size() + 2 * config.key_value_size() + 3 * config.hidden_size);
}

double PeakActivationBytes(const RankMemoryInput& input) {
  double held = 0, peak = 0;  // thousands of huge micro-batches pass int64
  for (const pipeline::Action& action : input.program) {
    const double bytes = static_cast<double>(input.stages[action.stage].activation_bytes());
    if (action.op == pipeline::Op::kForward) peak = std::max(peak, held += bytes);
    if (action.op == pipeline::Op::kBackward) held -= bytes;
  }
  return peak;
}

}  // namespace

int64_t ComputeBytes(absl::string_view compute) { return compute == "fp32" ? 4 : 2; }

int64_t StageWeightBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, int64_t compute_bytes,
                         const MemorySaving& saving) {
  const int64_t layer = model::LayerParameters(config) + model::AdapterParametersOfLayer(config, lora);
  int64_t parameters = stage.num_layers() * layer;
  if (saving.zero_stage >= 3 && saving.replicas > 1) parameters = parameters / saving.replicas + 2 * layer;
  const bool shared = stage.has_embedding() && stage.has_head() && config.tie_word_embeddings;
  if (stage.has_embedding() && !shared) parameters += model::EmbeddingParameters(config);
  if (stage.has_head()) parameters += model::HeadParameters(config);
  return parameters * compute_bytes;
}

int64_t StageAdapterBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, const MemorySaving& saving) {
  const int64_t layer = 4 * model::AdapterParametersOfLayer(config, lora);
  const int64_t whole = stage.num_layers() * layer;
  const int64_t replicas = std::max(1, saving.replicas);
  const int64_t moments = 2 * whole / (saving.zero_stage >= 1 ? replicas : 1);
  const int64_t gradients = saving.zero_stage >= 2 && replicas > 1 ? whole / replicas + 2 * layer : whole;
  return whole + gradients + moments;
}

int64_t StageActivationBytes(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage, int64_t tokens, int64_t compute_bytes,
                             const MemorySaving& saving) {
  int64_t layer = model::ActivationBytesOfLayer(config, lora, tokens, compute_bytes);
  if (saving.activation_checkpointing == "selective") layer -= 2 * tokens * config.intermediate_size * compute_bytes;
  if (saving.activation_checkpointing == "full") layer = model::HiddenBytes(config, tokens, compute_bytes);
  const int64_t layers = stage.num_layers() * layer;
  // The head's pass leaves the gradient of its input.
  return layers + (stage.has_head() ? model::HiddenBytes(config, tokens, compute_bytes) : 0);
}

int64_t RankPeakBytes(const RankMemoryInput& input) {
  const bool cuda = input.kind == "cuda";
  const int num_ranks = static_cast<int>(input.simulation.peak_activations.size());
  int64_t bytes = cuda ? kCudaRuntimeBytes : kCpuRuntimeBytes;
  int64_t workspace = 0;
  bool embedding = false, head = false;
  for (size_t s = input.pipeline_rank; s < input.stages.size(); s += num_ranks) {
    const v1::StagePlan& stage = input.stages[s];
    bytes += stage.weight_bytes() + stage.adapter_bytes();
    // What is made again in backward, one layer at a time.
    const int64_t again =
        input.saving.activation_checkpointing == "none" ? 0 : model::ActivationBytesOfLayer(input.config, input.lora, input.tokens, input.compute_bytes);
    if (stage.num_layers() > 0) workspace = std::max(workspace, again + LayerWorkspace(input.config, input.tokens, input.compute_bytes));
    if (stage.has_head()) workspace = std::max(workspace, 2 * 4 * input.config.vocab_size * std::min(input.tokens, cuda ? kCudaHeadRows : kCpuHeadRows));
    embedding |= stage.has_embedding();
    head |= stage.has_head();
  }
  // Stages of one rank share a tied embedding; a stage that holds both has counted it once already.
  if (embedding && head && input.config.tie_word_embeddings && input.stages.size() > 1) {
    bytes -= model::EmbeddingParameters(input.config) * input.compute_bytes;
  }
  const int64_t hidden = model::HiddenBytes(input.config, input.tokens, input.compute_bytes);
  for (const pipeline::ChannelUse& use : input.simulation.channels) {
    if (use.to == input.pipeline_rank) bytes += use.peak_posted * hidden;
    if (use.from == input.pipeline_rank) bytes += std::max(1, use.peak_in_flight) * hidden;
  }
  return static_cast<int64_t>(std::min(static_cast<double>(bytes + workspace) + PeakActivationBytes(input), 1e18));
}

std::string FormatBytes(int64_t bytes) {
  const double mib = static_cast<double>(bytes) / kMiB;
  if (mib >= 1024) return absl::StrFormat("%.1f GiB", mib / 1024);
  return absl::StrFormat(mib >= 10 ? "%.0f MiB" : "%.1f MiB", mib);
}

}  // namespace ppft::coordinator
