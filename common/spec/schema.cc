#include "common/spec/schema.h"

#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/spec/support.h"

namespace ppft::spec {
namespace {

constexpr double kInt32 = 2147483647.0;
constexpr double kInt53 = 9007199254740992.0;  // exact in a double
constexpr double kSteps = 1e12;
constexpr char kTypes[] = "summarization prompt_completion completion alpaca sharegpt messages";

// clang-format off
std::vector<Rule> MakeSchema() {
  return {
      {"name", Kind::kName, "job", 0, 63},
      {"labels", Kind::kTextMap, "", 0, 32},
      {"seed", Kind::kInt, "42", 0, kInt53},
      {"priority", Kind::kInt, "50", 0, 100},

      {"model.base_model", Kind::kName, "", 0, 1024},
      {"model.init_adapter", Kind::kName, "", 0, 4096},

      {"adapter.r", Kind::kInt, "16", 1, 1024},
      {"adapter.lora_alpha", Kind::kInt, "32", 1, 1e6},
      {.path = "adapter.lora_dropout", .kind = Kind::kNumber, .fallback = "0.05", .high = 1, .without_high = true},
      {"adapter.target_modules", Kind::kWords, "all-linear", 0, 0, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"},
      {"adapter.use_rslora", Kind::kBool, "false"},

      {"data.datasets[].path", Kind::kName, "", 0, 4096},
      {"data.datasets[].source", Kind::kName, "", 0, 4096},
      {"data.datasets[].type", Kind::kWord, "", 0, 0, kTypes},
      {"data.datasets[].field_map", Kind::kTextMap, "", 0, 8},
      {"data.test_datasets[].path", Kind::kName, "", 0, 4096},
      {"data.test_datasets[].source", Kind::kName, "", 0, 4096},
      {"data.test_datasets[].type", Kind::kWord, "", 0, 0, kTypes},
      {"data.test_datasets[].field_map", Kind::kTextMap, "", 0, 8},
      {.path = "data.val_set_size", .kind = Kind::kNumber, .fallback = "0", .high = 1, .without_high = true},
      {"data.instruction_prefix", Kind::kText, "\"Summarize the following article:\\n\\n\"", 0, 65536},
      {"data.response_prefix", Kind::kText, "\"\\n\\nSummary:\\n\"", 0, 65536},
      {"data.chat_template", Kind::kName, "tokenizer_default", 0, 4096},
      {"data.train_on_inputs", Kind::kBool, "false"},
      {"data.roles_to_train", Kind::kFixed, "[assistant]"},
      {"data.train_on_eos", Kind::kWord, "turn", 0, 0, "all turn last none"},
      {.path = "data.sequence_len", .kind = Kind::kInt, .fallback = "1024", .low = 8, .high = 1048576, .auto_is_default = true},
      {"data.excess_length_strategy", Kind::kWord, "truncate", 0, 0, "drop truncate raise"},
      {"data.sample_packing", Kind::kBool, "true"},
      {"data.shuffle", Kind::kBool, "true"},

      {.path = "training.num_epochs", .kind = Kind::kNumber, .high = 1e6, .without_low = true},
      {"training.max_steps", Kind::kInt, "", 1, kSteps},
      {"training.micro_batch_size", Kind::kInt, "4", 1, 65536},
      {.path = "training.gradient_accumulation_steps", .kind = Kind::kInt, .fallback = "8", .low = 1, .high = 65536, .auto_is_default = true},
      {"training.global_batch_size", Kind::kInt, "", 1, kInt32},
      {.path = "training.learning_rate", .kind = Kind::kNumber, .fallback = "2e-4", .high = 1e6, .without_low = true},
      {"training.lr_scheduler", Kind::kWord, "cosine", 0, 0, "constant linear cosine cosine_with_min_lr wsd"},
      {.path = "training.warmup_ratio", .kind = Kind::kNumber, .high = 1, .without_high = true},
      {"training.warmup_steps", Kind::kInt, "", 0, kSteps},
      {"training.min_lr_ratio", Kind::kNumber, "0", 0, 1},
      {.path = "training.decay_ratio", .kind = Kind::kNumber, .fallback = "0.1", .high = 1, .without_low = true},
      {"training.optimizer", Kind::kWord, "adamw", 0, 0, "adamw adam sgd adafactor lion muon adamw_8bit"},
      {.path = "training.adam_beta1", .kind = Kind::kNumber, .fallback = "0.9", .high = 1, .without_high = true},
      {.path = "training.adam_beta2", .kind = Kind::kNumber, .fallback = "0.999", .high = 1, .without_high = true},
      {.path = "training.adam_epsilon", .kind = Kind::kNumber, .fallback = "1e-8", .high = 1, .without_low = true},
      {"training.weight_decay", Kind::kNumber, "0", 0, 1e3},
      {"training.max_grad_norm", Kind::kNumber, "1", 0, 1e9},
      {"training.logging_steps", Kind::kInt, "1", 1, kSteps},

      {"precision.compute", Kind::kWord, "auto", 0, 0, "auto fp32 bf16 fp16"},
      {.path = "precision.loss_scale", .kind = Kind::kNumber, .fallback = "dynamic", .high = 1e18, .without_low = true, .zero_word = "dynamic"},
      {"precision.initial_scale_power", Kind::kInt, "16", 0, 60},
      {"precision.loss_scale_window", Kind::kInt, "1000", 1, kInt32},
      {"precision.hysteresis", Kind::kInt, "2", 1, 1000},
      {.path = "precision.min_loss_scale", .kind = Kind::kNumber, .fallback = "1", .high = 1e18, .without_low = true},
      {"precision.consecutive_hysteresis", Kind::kBool, "false"},

      {.path = "parallel.pipeline_parallel_size", .kind = Kind::kInt, .fallback = "auto", .low = 1, .high = 1024, .zero_word = "auto"},
      {.path = "parallel.data_parallel_size", .kind = Kind::kInt, .fallback = "auto", .low = 1, .high = 1024, .zero_word = "auto"},
      {"parallel.schedule", Kind::kWord, "auto", 0, 0, "auto gpipe 1f1b interleaved_1f1b"},
      {"parallel.virtual_stages", Kind::kInt, "1", 1, 64},
      {.path = "parallel.layers_per_stage", .kind = Kind::kInts, .low = 1, .high = 10000, .auto_is_default = true},
      {"parallel.zero_stage", Kind::kInt, "1", 0, 3},
      {"parallel.activation_checkpointing", Kind::kWord, "none", 0, 0, "none full selective auto"},
      {.path = "parallel.cuda_graphs", .kind = Kind::kWord, .fallback = "auto", .words = "auto off", .is_newer = true},
      {.path = "parallel.merge_micro_batches", .kind = Kind::kWord, .fallback = "auto", .words = "auto off", .is_newer = true},

      {"evaluation.eval_steps", Kind::kInt, "100", 0, kSteps},
      {"evaluation.eval_on_start", Kind::kBool, "true"},
      {"evaluation.metric_for_best_model", Kind::kWord, "eval_loss", 0, 0, "eval_loss"},
      {"evaluation.early_stopping_patience", Kind::kInt, "", 1, 1000000},

      {"checkpoint.save_steps", Kind::kInt, "200", 0, kSteps},
      {"checkpoint.save_total_limit", Kind::kInt, "3", 1, 100000},
      {"checkpoint.load_best_model_at_end", Kind::kBool, "true"},

      {"output.formats", Kind::kWords, "[adapter]", 0, 0, "adapter merged"},
      {.path = "output.merge_dtype", .kind = Kind::kWord, .words = "float32 bfloat16 float16", .auto_is_default = true},
      {"output.verify", Kind::kBool, "true"},

      {"limits.max_duration", Kind::kDuration, "", 1, 3.2e8},
      {"limits.max_restarts", Kind::kInt, "5", 0, 1000000},
      {"limits.stall_timeout", Kind::kDuration, "300s", 1, 604800},
  };
}

// Names of axolotl, transformers, DeepSpeed, LLaMA-Factory and torchtune.
const std::map<std::string, std::string, std::less<>>& OtherNames() {
  static const auto* const names = new std::map<std::string, std::string, std::less<>>{
      {"model", "model.base_model"}, {"model_name", "model.base_model"}, {"model_name_or_path", "model.base_model"}, {"pretrained_model_name_or_path", "model.base_model"},
      {"adapter_name_or_path", "model.init_adapter"}, {"lora_model_dir", "model.init_adapter"},
      {"alpha", "adapter.lora_alpha"}, {"dropout", "adapter.lora_dropout"}, {"lora_rank", "adapter.r"}, {"rslora", "adapter.use_rslora"},
      {"lora_target_modules", "adapter.target_modules"}, {"lora_target", "adapter.target_modules"}, {"peft_use_rslora", "adapter.use_rslora"},
      {"dataset", "data.datasets"}, {"train_file", "data.datasets"}, {"val_size", "data.val_set_size"}, {"validation_split", "data.val_set_size"},
      {"eval_dataset", "data.test_datasets"}, {"validation_file", "data.test_datasets"},
      {"max_seq_length", "data.sequence_len"}, {"max_seq_len", "data.sequence_len"}, {"max_length", "data.sequence_len"}, {"cutoff_len", "data.sequence_len"}, {"seq_len", "data.sequence_len"},
      {"packing", "data.sample_packing"}, {"template", "data.chat_template"},
      {"epochs", "training.num_epochs"}, {"num_train_epochs", "training.num_epochs"}, {"steps", "training.max_steps"}, {"max_train_steps", "training.max_steps"},
      {"batch_size", "training.micro_batch_size"}, {"per_device_train_batch_size", "training.micro_batch_size"}, {"train_micro_batch_size_per_gpu", "training.micro_batch_size"},
      {"train_batch_size", "training.global_batch_size"}, {"grad_accum", "training.gradient_accumulation_steps"}, {"accumulation_steps", "training.gradient_accumulation_steps"},
      {"lr", "training.learning_rate"}, {"lr_scheduler_type", "training.lr_scheduler"}, {"scheduler", "training.lr_scheduler"}, {"warmup", "training.warmup_steps"},
      {"optim", "training.optimizer"}, {"beta1", "training.adam_beta1"}, {"beta2", "training.adam_beta2"}, {"eps", "training.adam_epsilon"}, {"epsilon", "training.adam_epsilon"},
      {"gradient_clipping", "training.max_grad_norm"}, {"clip_grad_norm", "training.max_grad_norm"},
      {"dtype", "precision.compute"}, {"bf16", "precision.compute"}, {"fp16", "precision.compute"}, {"mixed_precision", "precision.compute"},
      {"pp", "parallel.pipeline_parallel_size"}, {"pp_size", "parallel.pipeline_parallel_size"}, {"dp", "parallel.data_parallel_size"}, {"dp_size", "parallel.data_parallel_size"},
      {"zero", "parallel.zero_stage"}, {"gradient_checkpointing", "parallel.activation_checkpointing"},
      {"patience", "evaluation.early_stopping_patience"}, {"evaluation_steps", "evaluation.eval_steps"},
      {"timeout", "limits.max_duration"},
  };
  return *names;
}
// clang-format on

std::string Plain(double value) {
  if (value == static_cast<double>(static_cast<int64_t>(value))) return absl::StrCat(static_cast<int64_t>(value));
  return absl::StrCat(value);
}

// "1000", "1e18": as it may be written where a number stands.
std::string Short(double value) {
  if (value < 1e6) return Plain(value);
  return absl::StrReplaceAll(absl::StrCat(value), {{"e+0", "e"}, {"e+", "e"}});
}

std::string RangeWords(const Rule& rule) {
  const auto text = [&](double value) { return rule.kind == Kind::kNumber ? Short(value) : Plain(value); };
  if (rule.without_low) return absl::StrCat("above ", text(rule.low), rule.without_high ? " and below " : " and at most ", text(rule.high));
  return absl::StrCat("from ", text(rule.low), rule.without_high ? " to below " : " to ", text(rule.high));
}

}  // namespace

const std::vector<Rule>& Schema() {
  static const auto* const schema = new std::vector<Rule>(MakeSchema());
  return *schema;
}

const Rule* FindRule(absl::string_view pattern) {
  for (const Rule& rule : Schema()) {
    if (pattern == rule.path) return &rule;
  }
  return nullptr;
}

std::vector<std::string> WordsOf(const Rule& rule) { return absl::StrSplit(rule.words, ' ', absl::SkipEmpty()); }

std::vector<std::string> SupportedWordsOf(const Rule& rule) {
  std::vector<std::string> words;
  for (std::string& word : WordsOf(rule)) {
    if (NotSupportedYet(rule.path, word).empty()) words.push_back(std::move(word));
  }
  return words;
}

std::string Describe(const Rule& rule) {
  const std::string zero = *rule.zero_word ? absl::StrCat(" or ", rule.zero_word) : rule.auto_is_default ? " or auto" : "";
  switch (rule.kind) {
    case Kind::kText:
      return absl::StrCat("a text of at most ", Plain(rule.high), " bytes");
    case Kind::kName:
      return absl::StrCat("a text of 1 to ", Plain(rule.high), " bytes without control characters");
    case Kind::kWord:
      return absl::StrCat("one of ", absl::StrJoin(SupportedWordsOf(rule), ", "));
    case Kind::kWords:
      return absl::StrCat("a list of some of ", absl::StrJoin(SupportedWordsOf(rule), ", "));
    case Kind::kInt:
      return absl::StrCat("a whole number ", RangeWords(rule), zero);
    case Kind::kInts:
      return absl::StrCat("a list of whole numbers ", RangeWords(rule), zero);
    case Kind::kNumber:
      return absl::StrCat("a number ", RangeWords(rule), zero);
    case Kind::kBool:
      return "true or false";
    case Kind::kDuration:
      return absl::StrCat("a duration with its unit, such as 300s, 5m or 2h, from ", Plain(rule.low), "s to ", Plain(std::floor(rule.high / 3600)), "h");
    case Kind::kTextMap:
      return absl::StrCat("at most ", Plain(rule.high), " pairs of a key and a text: {key: text}");
    case Kind::kFixed:
      return rule.fallback;
  }
  return "";
}

absl::string_view ResolveAlias(absl::string_view section, absl::string_view key) {
  if (section == "adapter" && (key == "lora_r" || key == "rank")) return "r";
  return key;
}

std::string KnownElsewhere(absl::string_view key) {
  const auto it = OtherNames().find(std::string(key));
  return it == OtherNames().end() ? "" : it->second;
}

bool IsGroup(const google::protobuf::FieldDescriptor* field) {
  return field->message_type() != nullptr && !field->is_map() && field->message_type()->full_name() != "google.protobuf.Duration";
}

std::string PatternOf(absl::string_view path) {
  std::string pattern;
  bool inside = false;
  for (const char c : path) {
    if (c == ']') inside = false;
    if (!inside) pattern += c;
    if (c == '[') inside = true;
  }
  return pattern;
}

std::string Join(absl::string_view prefix, absl::string_view name) { return prefix.empty() ? std::string(name) : absl::StrCat(prefix, ".", name); }

std::vector<std::string> RolesOf(absl::string_view type) {
  if (type == "summarization") return {"document", "summary"};
  if (type == "prompt_completion") return {"prompt", "completion"};
  if (type == "completion") return {"text"};
  return {};
}

}  // namespace ppft::spec
