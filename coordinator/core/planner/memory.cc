#include "coordinator/core/planner/memory.h"

#include <algorithm>
#include <map>

#include "common/model/inventory.h"

namespace ppft::coordinator {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
// A process with LibTorch loaded.
constexpr int64_t kCpuRuntimeBytes = 192 * kMiB;
// What does not pass through LibTorch's allocator, as found on H200s: a CUDA context with the kernels of LibTorch, cuBLAS and cuDNN; NCCL's kernels, where
// there is a communicator; each communicator's buffers.
constexpr int64_t kCudaRuntimeBytes = 728 * kMiB;
constexpr int64_t kNcclKernelBytes = 492 * kMiB;
constexpr int64_t kNcclBytes = 316 * kMiB;
// cuBLAS's on a Hopper; smaller elsewhere.
constexpr int64_t kCublasWorkspaceBytes = 32 * kMiB;
// What rounding of blocks and gaps between them add to what tensors hold: 1 to 3 % measured.
constexpr double kAllocatorRatio = 0.03;

// A job of thousands of huge micro-batches may pass int64.
int64_t Bounded(double bytes) { return static_cast<int64_t>(std::min(bytes, 1e18)); }

// Sets of activations that a stage's pool grows to: the most micro-batches between their forward and backward there.
std::map<int, int> PeakByStage(const pipeline::Program& program) {
  std::map<int, int> held, peak;
  for (const pipeline::Action& action : program) {
    if (action.op == pipeline::Op::kForward) peak[action.stage] = std::max(peak[action.stage], ++held[action.stage]);
    if (action.op == pipeline::Op::kBackward) --held[action.stage];
  }
  return peak;
}

// Two communicators to each neighbour, one among the replicas.
int64_t NcclBytes(const RankMemoryInput& input) {
  int64_t communicators = input.options.replicas > 1 ? 1 : 0;
  for (const pipeline::ChannelUse& use : input.simulation.channels) communicators += use.from == input.pipeline_rank || use.to == input.pipeline_rank ? 1 : 0;
  return communicators == 0 ? 0 : kNcclKernelBytes + communicators * kNcclBytes;
}

// Between GPUs the host is ahead of the device and holds what the transport lets it hold (DeviceTransportOptions::sends_held): p + 1 messages for p ranks.
int64_t TransferBytes(const RankMemoryInput& input) {
  const int64_t hidden = model::HiddenBytes(input.config, input.options.tokens, input.options.compute_bytes);
  const auto ranks = static_cast<int>(input.simulation.rank_bubble_ratio.size());
  int64_t messages = 0;
  for (const pipeline::ChannelUse& use : input.simulation.channels) {
    if (use.to == input.pipeline_rank) messages += use.peak_posted;
    if (use.from != input.pipeline_rank) continue;
    const int held = input.options.cuda ? std::min(use.num_messages, ranks + 1) : use.peak_in_flight;
    messages += std::max(1, held);
  }
  return Bounded(static_cast<double>(messages) * static_cast<double>(hidden));
}

// What an export needs beside weights and adapter, once the steps have given back what only they need: a matrix at a time is merged in fp32 and narrowed, a
// short document goes through the stages. A merged model that was read back comes when all of the trained one is gone, and holds a layer instead of all.
// `held`: by the rank's stages.
int64_t ExportBytes(const RankMemoryInput& input, const std::map<int, int>& held) {
  int64_t merging = 0, probing = 0;
  if (input.merges) {
    for (const std::string& module : model::TargetModules()) {
      const model::LinearShape shape = model::ShapeOfModule(input.config, module);
      merging = std::max(merging, shape.out * shape.in * (4 + 2));
    }
  }
  if (input.verifies) {
    model::StageMemoryOptions probe = input.options;
    probe.tokens = 2 * model::kProbeTokens;
    probe.targets = probe.longest_document = model::kProbeTokens;
    probe.evaluates = true;
    probe.checkpointing = model::ActivationCheckpointing::kNone;
    for (const v1::StagePlan& stage : input.stages) {
      if (held.count(stage.stage()) == 0) continue;
      const model::StageMemory memory = StageMemoryOf(input.config, input.lora, stage, probe);
      probing += memory.transient + memory.scratch;
      if (stage.has_head()) probing += model::kProbeTokens * input.config.vocab_size * (4 + input.options.compute_bytes);
    }
  }
  return std::max(merging, probing);
}

}  // namespace

int64_t ComputeBytes(absl::string_view compute) { return compute == "fp32" ? 4 : 2; }

model::StageMemory StageMemoryOf(const model::ModelConfig& config, const model::LoraShape& lora, const v1::StagePlan& stage,
                                 const model::StageMemoryOptions& options) {
  return model::MemoryOfStage(config, lora, {stage.num_layers(), stage.has_embedding(), stage.has_head()}, options);
}

v1::MemoryEstimate RankMemory(const RankMemoryInput& input) {
  const bool cuda = input.options.cuda;
  const std::map<int, int> peak = PeakByStage(input.program);
  int64_t weights = 0, adapter = 0, workspace = 0, temporary = 0;
  double activations = 0;
  for (const v1::StagePlan& stage : input.stages) {
    const auto held = peak.find(stage.stage());
    if (held == peak.end()) continue;
    const model::StageMemory memory = StageMemoryOf(input.config, input.lora, stage, input.options);
    weights += memory.weights;
    adapter += memory.masters + memory.gradients + memory.moments;
    activations += static_cast<double>(memory.kept) * held->second;
    workspace += memory.transient + memory.scratch;
    temporary = std::max(temporary, memory.temporary);
    // A checkpoint's copies; on a GPU they are made on the host.
    if (!cuda) temporary = std::max(temporary, 3 * memory.masters);
  }
  workspace += temporary;
  const double exported = static_cast<double>(ExportBytes(input, peak));
  if (exported > activations + static_cast<double>(workspace)) workspace = Bounded(exported - activations);
  if (cuda) workspace += kCublasWorkspaceBytes;
  v1::MemoryEstimate estimate;
  estimate.set_weight_bytes(weights);
  estimate.set_adapter_bytes(adapter);
  estimate.set_activation_bytes(Bounded(activations));
  estimate.set_workspace_bytes(workspace);
  estimate.set_transfer_bytes(TransferBytes(input));
  if (cuda) estimate.set_workspace_bytes(Bounded(static_cast<double>(workspace) + kAllocatorRatio * static_cast<double>(TotalBytes(estimate))));
  estimate.set_runtime_bytes(cuda ? kCudaRuntimeBytes + NcclBytes(input) : kCpuRuntimeBytes);
  return estimate;
}

int64_t TotalBytes(const v1::MemoryEstimate& memory) {
  double total = 0;
  for (const int64_t part :
       {memory.weight_bytes(), memory.adapter_bytes(), memory.activation_bytes(), memory.workspace_bytes(), memory.transfer_bytes(), memory.runtime_bytes()}) {
    total += static_cast<double>(part);
  }
  return Bounded(total);
}

}  // namespace ppft::coordinator
