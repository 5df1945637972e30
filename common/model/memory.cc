#include "common/model/memory.h"

#include <algorithm>
#include <array>
#include <bit>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/model/inventory.h"

namespace ppft::model {
namespace {

constexpr int64_t kAccBytes = 4;  // masters, gradients, moments and statistics are fp32
// Parts of a layer that is shared out begin at whole words.
constexpr int64_t kPartMultiple = 8;
// The numbers of a pass (ids, positions, targets, what dropout draws from) lie in one block whose parts begin at multiples of this.
constexpr int64_t kBlockAlignment = 256;
// Rows that a product on a CPU makes at a time before they are copied.
constexpr int64_t kCpuProductRows = 512;
// cuDNN's attention serves heads up to here (worker/trainer/cuda/attention.cc).
constexpr int64_t kCudnnHeadDim = 128;
constexpr int64_t kFlashPadding = 128;     // rows, of each document
constexpr int64_t kMultiprocessors = 148;  // of a B200; others have fewer

// One stack of modules that read the same input: q,k,v; o; gate,up; down.
struct Linear {
  int64_t in = 0;
  int64_t out = 0;
  int64_t lora_columns = 0;  // r per adapted module
  bool a_below = false;      // the compute copy of A lies in further rows below [W | sB]

  int64_t a_rows() const { return a_below ? lora_columns : 0; }
  int64_t weight_size() const { return (out + a_rows()) * (in + lora_columns); }
};

struct Linears {
  Linear qkv, o, gate_up, down;

  std::array<const Linear*, 4> all() const { return {&qkv, &o, &gate_up, &down}; }
};

Linear StackOf(const ModelConfig& config, const LoraShape& lora, std::initializer_list<int> modules) {
  Linear linear;
  for (const int module : modules) {
    const std::string& name = TargetModules()[static_cast<size_t>(module)];
    const LinearShape shape = ShapeOfModule(config, name);
    linear.in = shape.in;
    linear.out += shape.out;
    if (std::find(lora.target_modules.begin(), lora.target_modules.end(), name) != lora.target_modules.end()) linear.lora_columns += lora.r;
  }
  return linear;
}

bool SharesLayers(const StageMemoryOptions& options) { return options.zero_stage >= 3 && options.replicas > 1; }
bool IsCaptured(const ModelConfig& config, const StageMemoryOptions& options) {
  return options.cuda && options.tokens <= kMostCapturedTokens && !AttentionIsPlainProducts(options.compute_bytes, config.head_dim);
}

Linears LinearsOf(const ModelConfig& config, const LoraShape& lora, const StageMemoryOptions& options) {
  Linears linears = {StackOf(config, lora, {0, 1, 2}), StackOf(config, lora, {3}), StackOf(config, lora, {4, 5}), StackOf(config, lora, {6})};
  if (!options.cuda || options.compute_bytes == kAccBytes || options.dropout || SharesLayers(options)) return linears;
  for (Linear* linear : {&linears.qkv, &linears.o, &linears.down}) linear->a_below = linear->out < 2 * linear->in;
  return linears;
}

int64_t BlockBytes(int64_t tokens, bool dropout) {
  const auto part = [](int64_t bytes) { return (bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment; };
  return kBlockAlignment + 2 * part(4 * tokens) + 3 * part(8 * tokens) + (dropout ? part(16 * tokens) : 0);
}

int64_t RowSize(const ModelConfig& config) { return config.query_size() + 2 * config.key_value_size(); }

int64_t WeightBytes(const ModelConfig& config, const Linears& linears, const StageShape& stage, const StageMemoryOptions& options) {
  int64_t layer = 0;
  for (const Linear* linear : linears.all()) layer += linear->weight_size();
  int64_t elements = 0;
  if (SharesLayers(options)) {
    const int64_t part = ((layer + options.replicas - 1) / options.replicas + kPartMultiple - 1) / kPartMultiple * kPartMultiple;
    elements = stage.num_layers * part + 2 * options.replicas * part;
  } else {
    elements = stage.num_layers * layer;
  }
  elements += stage.num_layers * 2 * config.hidden_size;  // norms
  const int64_t table = config.vocab_size * config.hidden_size;
  if (stage.has_embedding || (stage.has_head && config.tie_word_embeddings)) elements += table;
  if (stage.has_head) elements += config.hidden_size + (config.tie_word_embeddings ? 0 : table);
  return elements * options.compute_bytes;
}

// Of one layer: [T, columns] kept in the compute type, and fp32 statistics.
struct LayerColumns {
  int64_t compute = 0;
  int64_t statistics = 0;

  int64_t bytes(int64_t tokens, int64_t compute_bytes) const { return tokens * (compute * compute_bytes + statistics * kAccBytes); }
};

LayerColumns ColumnsOf(const ModelConfig& config, const Linears& linears, ActivationCheckpointing checkpointing) {
  LayerColumns columns;
  columns.compute = config.hidden_size;
  if (checkpointing == ActivationCheckpointing::kFull) return columns;
  columns.compute += config.hidden_size + RowSize(config) + config.query_size();
  for (const Linear* linear : linears.all()) columns.compute += linear->lora_columns;
  if (checkpointing == ActivationCheckpointing::kNone) columns.compute += linears.gate_up.out;
  columns.statistics = 2 + config.num_attention_heads;  // 1/rms twice, log-sum-exp per head
  return columns;
}

// Rows of the buffers that all layers of a stage share. On a GPU those that are never in use at once have one buffer together:
// worker/trainer/model/activations.cc.
int64_t ScratchBytes(const ModelConfig& config, const Linears& linears, const StageShape& stage, const StageMemoryOptions& options) {
  const int64_t tokens = options.tokens, hidden = config.hidden_size;
  const int64_t head_rows = stage.has_head ? options.targets : 0;
  int64_t widest = 0, dropped = 0;
  for (const Linear* linear : linears.all()) {
    widest = std::max(widest, linear->in + linear->lora_columns);
    if (linear->lora_columns > 0 && options.dropout) dropped = std::max(dropped, linear->in);
  }
  const int64_t normed = hidden + std::max(linears.qkv.lora_columns, linears.gate_up.lora_columns);
  const int64_t gated = config.intermediate_size + linears.down.lora_columns;
  const int64_t qkv = RowSize(config) + linears.qkv.a_rows();
  const int64_t logits = std::min(head_rows, options.head_rows) * config.vocab_size;
  // The gradient of the residual stream, where nobody takes it away or it is wider than what goes on.
  const int64_t wider = std::max(linears.o.a_rows(), linears.down.a_rows());
  const int64_t residual = stage.has_embedding || wider > 0 || IsCaptured(config, options) ? hidden + wider : 0;
  int64_t elements = 0;
  if (options.cuda) {
    // Attention's gradients by parts lie beside the gradient of its output.
    const int64_t parts = linears.o.in + linears.o.lora_columns + RowSize(config);
    elements = std::max(tokens * std::max({normed, gated, widest, parts}), logits) + tokens * (std::max(hidden, qkv) + dropped) +
               std::max(tokens * residual, head_rows * hidden);
  } else {
    elements = tokens * (normed + gated + hidden + widest + dropped + qkv + residual) + 3 * head_rows * hidden + logits;
  }
  return elements * options.compute_bytes;
}

// The backward of flash attention (FlashAttention-2, 2307.08691) as LibTorch has it for documents of many lengths: fp32 sums of dq whose rows are padded for
// every document of the table, in deterministic mode one set for each of the blocks that would add to the same; dk and dv for every query head; the results.
int64_t FlashBytes(const ModelConfig& config, const StageMemoryOptions& options) {
  const auto documents = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(1, options.documents))));
  const int64_t heads = config.num_attention_heads, multiple = config.head_dim <= 128 ? 32 : 64;
  const int64_t rows = options.tokens + kFlashPadding * documents, width = (config.head_dim + multiple - 1) / multiple * multiple;
  const int64_t sets = options.deterministic ? (kMultiprocessors + documents * heads - 1) / (documents * heads) : 1;
  const int64_t expanded = config.num_key_value_heads == heads ? 0 : 2 * config.query_size();
  return rows * heads * (sets * width + 1) * kAccBytes + options.tokens * (expanded + RowSize(config)) * options.compute_bytes;
}

// cuDNN's backward has a workspace of three fp32 values per query element (sums of dq, and dk and dv for every query head). It rounds the tokens up so that
// few plans serve all micro-batches. The gradient of gate and up, done with by then, is room for it where it suffices.
int64_t CudaAttentionBytes(const ModelConfig& config, const StageMemoryOptions& options) {
  const int64_t tokens = options.tokens, captured = IsCaptured(config, options) ? 2 : 1;
  if (AttentionIsPlainProducts(options.compute_bytes, config.head_dim)) {
    // Scores, probabilities, their gradients and the mask of one document and group of heads.
    const int64_t group = config.num_attention_heads / std::max<int64_t>(1, config.num_key_value_heads);
    const int64_t scores = kAccBytes * (3 * group + 1) * options.longest_document * options.longest_document;
    // Their rows in fp32.
    return scores + (options.compute_bytes == kAccBytes ? 0 : kAccBytes * (5 * group + 2) * options.longest_document * config.head_dim);
  }
  if (options.flash || config.head_dim > kCudnnHeadDim) return FlashBytes(config, options) * captured;
  const int64_t step = std::max<int64_t>(1024, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(1, tokens)))) / 8);
  const int64_t rounded = (tokens + step - 1) / step * step;
  const int64_t workspace = rounded * kAccBytes * (3 * config.query_size() + config.num_attention_heads);
  if (workspace <= tokens * 2 * config.intermediate_size * options.compute_bytes) return 0;
  return workspace * captured;
}

int64_t CpuTemporaryBytes(const ModelConfig& config, const Linears& linears, const StageShape& stage, const StageMemoryOptions& options) {
  int64_t widest = 0;
  for (const Linear* linear : linears.all()) widest = std::max({widest, linear->out, linear->in + linear->lora_columns});
  int64_t product = std::min(options.tokens, kCpuProductRows) * widest;
  if (stage.has_head) product = std::max(product, std::min(options.targets, options.head_rows) * config.vocab_size);
  return std::max(product, options.tokens * RowSize(config)) * options.compute_bytes;
}

}  // namespace

absl::StatusOr<ActivationCheckpointing> ParseActivationCheckpointing(absl::string_view word) {
  for (const auto checkpointing : {ActivationCheckpointing::kNone, ActivationCheckpointing::kSelective, ActivationCheckpointing::kFull}) {
    if (word == WordOf(checkpointing)) return checkpointing;
  }
  return absl::InvalidArgumentError(absl::StrCat("activation_checkpointing \"", word, "\" is unknown: use none, selective or full"));
}

absl::string_view WordOf(ActivationCheckpointing checkpointing) {
  switch (checkpointing) {
    case ActivationCheckpointing::kSelective:
      return "selective";
    case ActivationCheckpointing::kFull:
      return "full";
    default:
      return "none";
  }
}

StageMemory MemoryOfStage(const ModelConfig& config, const LoraShape& lora, const StageShape& stage, const StageMemoryOptions& options) {
  const Linears linears = LinearsOf(config, lora, options);
  const int64_t tokens = options.tokens, bytes = options.compute_bytes;
  StageMemory memory;
  memory.weights = WeightBytes(config, linears, stage, options);

  const int64_t of_layer = AdapterParametersOfLayer(config, lora);
  const int64_t parameters = stage.num_layers * of_layer;
  const bool shared = options.replicas > 1;
  const auto part = [&](int64_t count) { return (count + options.replicas - 1) / options.replicas; };
  memory.masters = parameters * kAccBytes;
  if (bytes != kAccBytes) {
    for (const Linear* linear : linears.all()) memory.masters += stage.num_layers * (linear->lora_columns - linear->a_rows()) * linear->in * bytes;
  }
  memory.gradients = (shared && options.zero_stage >= 2 ? part(parameters) + 2 * of_layer : parameters) * kAccBytes;
  memory.moments = 2 * (shared && options.zero_stage >= 1 ? part(parameters) : parameters) * kAccBytes;

  memory.kept = stage.num_layers * ColumnsOf(config, linears, options.checkpointing).bytes(tokens, bytes) + BlockBytes(tokens, options.dropout);
  if (stage.has_head) memory.kept += options.targets * config.hidden_size * bytes;  // gradient of the hidden state
  if (options.checkpointing != ActivationCheckpointing::kNone || options.evaluates) {
    // The layer's input is the kept one where backward makes things again.
    memory.transient = ColumnsOf(config, linears, ActivationCheckpointing::kNone).bytes(tokens, bytes);
    memory.transient += options.evaluates ? BlockBytes(tokens, options.dropout) : -tokens * config.hidden_size * bytes;
  }
  memory.scratch = ScratchBytes(config, linears, stage, options);
  memory.temporary = options.cuda ? CudaAttentionBytes(config, options) : CpuTemporaryBytes(config, linears, stage, options);
  return memory;
}

}  // namespace ppft::model
