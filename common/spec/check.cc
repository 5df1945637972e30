#include "common/spec/check.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/format.h"
#include "common/spec/reader.h"
#include "common/spec/schema.h"
#include "common/spec/spec.h"
#include "common/spec/suggest.h"
#include "common/spec/support.h"

namespace ppft::spec {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

constexpr int kMaxDatasets = 64;
constexpr double kMaxMicrobatchTokens = 1 << 24;

// A value as people write it, cut when long.
std::string Quote(absl::string_view text) {
  if (text.size() > 60) return absl::StrCat("\"", text.substr(0, 57), "…\"");
  return absl::StrCat("\"", text, "\"");
}

bool HasControlCharacters(absl::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
}

bool InRange(const Rule& rule, double value) {
  if (!std::isfinite(value)) return false;
  if (rule.without_low ? value <= rule.low : value < rule.low) return *rule.zero_word && value == 0;
  return rule.without_high ? value < rule.high : value <= rule.high;
}

std::string NumberText(double value) { return std::isfinite(value) ? absl::StrCat(value) : std::isnan(value) ? "NaN" : value > 0 ? "infinity" : "-infinity"; }

// One leaf after the other: kind, range, words, support.
class LeafChecker {
 public:
  explicit LeafChecker(std::vector<Finding>* out) : out_(out) {}

  void Group(const Message& message, const std::string& prefix) {
    for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
      const FieldDescriptor* field = message.GetDescriptor()->field(i);
      const std::string path = Join(prefix, field->name());
      if (!IsGroup(field)) {
        Leaf(message, field, path);
      } else if (!field->is_repeated()) {
        Group(message.GetReflection()->GetMessage(message, field), path);
      } else {
        for (int item = 0; item < message.GetReflection()->FieldSize(message, field); ++item) {
          Group(message.GetReflection()->GetRepeatedMessage(message, field, item), absl::StrCat(path, "[", item, "]"));
        }
      }
    }
  }

 private:
  void Add(const std::string& path, std::string message) { out_->push_back({path, std::move(message), {}}); }

  void Leaf(const Message& message, const FieldDescriptor* field, const std::string& path) {
    const std::string pattern = PatternOf(path);
    const Rule* rule = FindRule(pattern);
    if (rule == nullptr || (field->has_presence() && !message.GetReflection()->HasField(message, field))) return;
    switch (rule->kind) {
      case Kind::kText:
      case Kind::kName:
        return Text(*rule, path, message.GetReflection()->GetString(message, field));
      case Kind::kWord:
        return Word(*rule, path, message.GetReflection()->GetString(message, field));
      case Kind::kWords:
        return Words(*rule, path, message, field);
      case Kind::kInt:
      case Kind::kNumber:
        return Number(*rule, path, Value(message, field));
      case Kind::kInts:
        for (int i = 0; i < message.GetReflection()->FieldSize(message, field); ++i) {
          Number(*rule, absl::StrCat(path, "[", i, "]"), message.GetReflection()->GetRepeatedInt32(message, field, i));
        }
        return;
      case Kind::kDuration: {
        const auto& duration = static_cast<const google::protobuf::Duration&>(message.GetReflection()->GetMessage(message, field));
        const double seconds = static_cast<double>(duration.seconds()) + duration.nanos() * 1e-9;
        if (!InRange(*rule, seconds)) Add(path, absl::StrCat(seconds, "s is out of range: use ", Describe(*rule)));
        return;
      }
      case Kind::kTextMap: {
        const int size = message.GetReflection()->FieldSize(message, field);
        if (size > rule->high) Add(path, absl::StrCat("has ", size, " pairs: use at most ", rule->high));
        return;
      }
      case Kind::kBool:
      case Kind::kFixed:
        return;
    }
  }

  static double Value(const Message& message, const FieldDescriptor* field) {
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        return message.GetReflection()->GetInt32(message, field);
      case FieldDescriptor::CPPTYPE_INT64:
        return static_cast<double>(message.GetReflection()->GetInt64(message, field));
      default:
        return message.GetReflection()->GetDouble(message, field);
    }
  }

  void Number(const Rule& rule, const std::string& path, double value) {
    if (!InRange(rule, value)) {
      Add(path, absl::StrCat(NumberText(value), std::isfinite(value) ? " is out of range: use " : " is not a finite number: use ", Describe(rule)));
      return;
    }
    if (rule.kind == Kind::kInt && value != std::floor(value)) return Add(path, absl::StrCat(value, " is not a whole number: use ", Describe(rule)));
    const std::string refusal = NotSupportedYet(PatternOf(path), absl::StrCat(value));
    if (!refusal.empty()) Add(path, refusal);
  }

  void Text(const Rule& rule, const std::string& path, const std::string& value) {
    if (static_cast<double>(value.size()) > rule.high) return Add(path, absl::StrCat("has ", value.size(), " bytes: use at most ", rule.high));
    if (rule.kind == Kind::kName ? HasControlCharacters(value) : value.find('\0') != std::string::npos) {
      return Add(path, "holds a control character: remove it");
    }
    const std::string refusal = value.empty() ? "" : NotSupportedYet(PatternOf(path), value);
    if (!refusal.empty()) Add(path, refusal);
  }

  void Word(const Rule& rule, const std::string& path, const std::string& value) {
    const std::vector<std::string> words = WordsOf(rule);
    // Unset: RuleChecker says what may not be; or left so by a client that does not know the field.
    if (value.empty() && (!*rule.fallback || rule.is_newer)) return;
    if (std::find(words.begin(), words.end(), value) == words.end()) return Add(path, NotAWord(rule, value));
    const std::string refusal = NotSupportedYet(PatternOf(path), value);
    if (!refusal.empty()) Add(path, refusal);
  }

  static std::string NotAWord(const Rule& rule, const std::string& value) {
    const std::vector<std::string> words = SupportedWordsOf(rule);
    const std::string nearest = Nearest(value, words);
    return absl::StrCat(Quote(value), " is not known", nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?"),
                        nearest.empty() ? ": use " : " Use ", words.size() == 1 ? "" : "one of ", absl::StrJoin(words, ", "));
  }

  void Words(const Rule& rule, const std::string& path, const Message& message, const FieldDescriptor* field) {
    const std::vector<std::string> words = WordsOf(rule);
    std::set<std::string> seen;
    const int size = message.GetReflection()->FieldSize(message, field);
    if (size == 0) Add(path, absl::StrCat("is empty: use ", Describe(rule)));
    for (int i = 0; i < size; ++i) {
      const std::string value = message.GetReflection()->GetRepeatedString(message, field, i);
      const std::string item = absl::StrCat(path, "[", i, "]");
      if (std::find(words.begin(), words.end(), value) == words.end()) {
        Add(item, NotAWord(rule, value));
      } else if (!seen.insert(value).second) {
        Add(item, absl::StrCat(Quote(value), " stands there twice: remove one"));
      }
    }
  }

  std::vector<Finding>* const out_;
};

class RuleChecker {
 public:
  RuleChecker(const v1::JobSpec& spec, std::vector<Finding>* out) : spec_(spec), out_(out) {}

  void Run() {
    Names();
    Datasets(spec_.data().datasets(), "data.datasets");
    Datasets(spec_.data().test_datasets(), "data.test_datasets");
    Length();
    Batch();
    Schedule();
    LossScale();
    Parallel();
    Evaluation();
  }

 private:
  void Add(std::string field, std::string message, std::vector<std::string> others = {}) {
    out_->push_back({std::move(field), std::move(message), std::move(others)});
  }

  void Names() {
    const std::string& name = spec_.name();
    const auto allowed = [](char c) { return absl::ascii_islower(c) || absl::ascii_isdigit(c) || c == '.' || c == '_' || c == '-'; };
    if (name.empty() || !std::all_of(name.begin(), name.end(), allowed)) {
      Add("name", absl::StrCat(Quote(name), " is not a name: use 1 to 63 of the characters a-z 0-9 . _ -"));
    }
    for (const auto& [key, value] : spec_.labels()) {
      if (key.empty() || key.size() > 63 || value.size() > 63 || HasControlCharacters(key) || HasControlCharacters(value)) {
        Add("labels", absl::StrCat(Quote(key), ": keys and values of labels have 1 to 63 bytes without control characters"));
      }
    }
    const std::string& base = spec_.model().base_model();
    if (base.empty()) Add("model.base_model", "is missing: name a registered model (ppctl models list shows them)");
    for (const absl::string_view part : absl::StrSplit(base, '/')) {
      if (part == "..")
        return Add("model.base_model",
                   absl::StrCat(Quote(base), " leaves the coordinator's model roots: use the name of a registered model (ppctl models list)"));
    }
  }

  template <typename List>
  void Datasets(const List& datasets, const std::string& path) {
    if (path == "data.datasets" && datasets.empty()) {
      Add(path, "is missing: list at least one dataset, such as datasets: [{path: train.jsonl, type: prompt_completion}]");
    }
    if (datasets.size() > kMaxDatasets) Add(path, absl::StrCat("has ", datasets.size(), " entries: use at most ", kMaxDatasets));
    for (int i = 0; i < datasets.size(); ++i) {
      const v1::DatasetSpec& dataset = datasets[i];
      const std::string item = absl::StrCat(path, "[", i, "]");
      if (dataset.path().empty()) Add(absl::StrCat(item, ".path"), "is missing: name a JSONL file or a dataset id (ds-…)");
      if (dataset.type().empty()) {
        Add(absl::StrCat(item, ".type"),
            "is missing: say what a row holds: summarization (document, summary), prompt_completion (prompt, completion) or completion (text)");
      }
      FieldMap(dataset, absl::StrCat(item, ".field_map"));
    }
  }

  void FieldMap(const v1::DatasetSpec& dataset, const std::string& path) {
    const std::vector<std::string> roles = RolesOf(dataset.type());
    if (roles.empty()) return;
    for (const auto& [role, key] : dataset.field_map()) {
      if (std::find(roles.begin(), roles.end(), role) == roles.end()) {
        const std::string nearest = Nearest(role, roles);
        Add(path, absl::StrCat(Quote(role), " is not a part of a ", dataset.type(), " row",
                               nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?"), " Its parts are ", absl::StrJoin(roles, ", ")));
      } else if (key.empty() || key.size() > 1024) {
        Add(path, absl::StrCat(Quote(role), " must name a key of the rows, of 1 to 1024 bytes"));
      }
    }
    std::map<std::string, std::string> role_of;
    for (const std::string& role : roles) {
      const auto key = dataset.field_map().find(role);
      if (key == dataset.field_map().end()) {
        Add(path, absl::StrCat("does not say which key holds the ", role));
      } else if (const auto [first, added] = role_of.emplace(key->second, role); !added && !key->second.empty()) {
        Add(path, absl::StrCat("gives the key ", Quote(key->second), " to two parts of a row, ", first->second, " and ", role, ": give each its own key"));
      }
    }
  }

  void Length() {
    const v1::TrainingSpec& training = spec_.training();
    if (training.has_num_epochs() && training.has_max_steps()) {
      Add("training.num_epochs", "num_epochs and max_steps contradict each other: remove one of them", {"training.max_steps"});
    }
    if (!training.has_num_epochs() && !training.has_max_steps()) Add("training.num_epochs", "is missing: set num_epochs or max_steps", {"training.max_steps"});
    if (training.has_warmup_ratio() && training.has_warmup_steps()) {
      Add("training.warmup_ratio", "warmup_ratio and warmup_steps contradict each other: remove one of them", {"training.warmup_steps"});
    }
    if (training.has_warmup_steps() && training.has_max_steps() && training.warmup_steps() > training.max_steps()) {
      Add("training.warmup_steps", absl::StrCat("warmup_steps (", training.warmup_steps(), ") is more than max_steps (", training.max_steps(), "): lower it"),
          {"training.max_steps"});
    }
  }

  void Batch() {
    const v1::TrainingSpec& training = spec_.training();
    const double tokens = static_cast<double>(training.micro_batch_size()) * spec_.data().sequence_len();
    if (tokens > kMaxMicrobatchTokens) {
      Add("training.micro_batch_size",
          absl::StrCat("micro_batch_size (", training.micro_batch_size(), ") x sequence_len (", spec_.data().sequence_len(), ") is more than ", 1 << 24,
                       " tokens in a micro-batch: lower one of them"),
          {"data.sequence_len"});
    }
    if (!training.has_global_batch_size()) return;
    const int64_t replicas = std::max(1, spec_.parallel().data_parallel_size());
    const int64_t per_round = training.micro_batch_size() * replicas;
    const int64_t global = training.global_batch_size();
    if (per_round <= 0) return;
    if (global % per_round != 0) {
      Add("training.global_batch_size",
          absl::StrCat("global_batch_size (", global, ") is not a multiple of micro_batch_size (", training.micro_batch_size(), ") x data_parallel_size (",
                       replicas, "): use ", std::max<int64_t>(1, global / per_round) * per_round, " or ", (global / per_round + 1) * per_round),
          {"training.micro_batch_size", "parallel.data_parallel_size"});
    } else if (global != per_round * training.gradient_accumulation_steps()) {
      Add("training.global_batch_size",
          absl::StrCat("global_batch_size (", global, ") contradicts gradient_accumulation_steps (", training.gradient_accumulation_steps(),
                       ") x micro_batch_size (", training.micro_batch_size(), ") x data_parallel_size (", replicas,
                       ") = ", per_round * training.gradient_accumulation_steps(), ": remove one of them"),
          {"training.gradient_accumulation_steps"});
    }
  }

  void Schedule() {
    const v1::TrainingSpec& training = spec_.training();
    const bool wsd = training.lr_scheduler() == "wsd";
    if (training.min_lr_ratio() != 0 && !wsd && training.lr_scheduler() != "cosine_with_min_lr") {
      Add("training.min_lr_ratio",
          absl::StrCat("min_lr_ratio has no effect with lr_scheduler: ", training.lr_scheduler(), ": remove it, or use cosine_with_min_lr or wsd"),
          {"training.lr_scheduler"});
    }
    if (training.decay_ratio() != 0.1 && !wsd) {
      Add("training.decay_ratio", absl::StrCat("decay_ratio has no effect with lr_scheduler: ", training.lr_scheduler(), ": remove it, or use wsd"),
          {"training.lr_scheduler"});
    }
    if (wsd && training.has_warmup_ratio() && training.warmup_ratio() + training.decay_ratio() > 1) {
      Add("training.warmup_ratio",
          absl::StrCat("warmup_ratio (", training.warmup_ratio(), ") + decay_ratio (", training.decay_ratio(), ") is more than 1: lower one of them"),
          {"training.decay_ratio"});
    }
  }

  // A static scale never changes: what steers a dynamic one contradicts it. A dynamic one begins no lower than it may fall.
  void LossScale() {
    const v1::PrecisionSpec& precision = spec_.precision();
    if (precision.loss_scale() == 0) {
      const double first = std::exp2(precision.initial_scale_power());
      if (precision.compute() != "fp16" || precision.min_loss_scale() <= first) return;
      return Add("precision.min_loss_scale",
                 absl::StrCat("min_loss_scale (", precision.min_loss_scale(), ") is above the scale at the start, 2^initial_scale_power (2^",
                              precision.initial_scale_power(), " = ", first, "): lower it, or raise initial_scale_power"),
                 {"precision.initial_scale_power"});
    }
    const v1::PrecisionSpec& defaults = Defaults().precision();
    const std::pair<const char*, bool> changed[] = {{"initial_scale_power", precision.initial_scale_power() != defaults.initial_scale_power()},
                                                    {"loss_scale_window", precision.loss_scale_window() != defaults.loss_scale_window()},
                                                    {"hysteresis", precision.hysteresis() != defaults.hysteresis()},
                                                    {"min_loss_scale", precision.min_loss_scale() != defaults.min_loss_scale()},
                                                    {"consecutive_hysteresis", precision.consecutive_hysteresis()}};
    for (const auto& [key, differs] : changed) {
      if (!differs) continue;
      Add(absl::StrCat("precision.", key),
          absl::StrCat(key, " steers a dynamic loss scale and contradicts loss_scale: ", precision.loss_scale(), ": remove it, or use loss_scale: dynamic"),
          {"precision.loss_scale"});
    }
  }

  void Parallel() {
    const v1::ParallelSpec& parallel = spec_.parallel();
    const bool interleaved = parallel.schedule() == "interleaved_1f1b";
    if (interleaved && parallel.virtual_stages() == 1) {
      Add("parallel.virtual_stages", "schedule: interleaved_1f1b needs virtual_stages of at least 2: set it, or use schedule: 1f1b", {"parallel.schedule"});
    }
    if (!interleaved && parallel.virtual_stages() > 1) {
      Add("parallel.virtual_stages",
          absl::StrCat("virtual_stages (", parallel.virtual_stages(), ") needs schedule: interleaved_1f1b, not ", parallel.schedule(), ": change one of them"),
          {"parallel.schedule"});
    }
    const int stages = parallel.pipeline_parallel_size();
    const int microbatches = spec_.training().gradient_accumulation_steps();
    if (interleaved && stages > 0 && microbatches % stages != 0) {
      Add("training.gradient_accumulation_steps",
          absl::StrCat("gradient_accumulation_steps (", microbatches, ") must be a multiple of pipeline_parallel_size (", stages,
                       ") with schedule: interleaved_1f1b: use ", (microbatches / stages + 1) * stages, ", or schedule: 1f1b"),
          {"parallel.pipeline_parallel_size", "parallel.schedule"});
    }
    LayersPerStage();
  }

  void LayersPerStage() {
    const v1::ParallelSpec& parallel = spec_.parallel();
    const int count = parallel.layers_per_stage_size();
    if (count == 0) return;
    const int stages = parallel.pipeline_parallel_size();
    const int chunks = std::max(1, parallel.virtual_stages());
    if (stages > 0 ? count != stages * chunks : count % chunks != 0) {
      Add("parallel.layers_per_stage",
          absl::StrCat("layers_per_stage has ", Counted(count, "number"), ", but pipeline_parallel_size (", stages > 0 ? absl::StrCat(stages) : "auto",
                       ") x virtual_stages (", chunks, ") asks for ", stages > 0 ? absl::StrCat(stages * chunks) : absl::StrCat("a multiple of ", chunks)),
          {"parallel.pipeline_parallel_size", "parallel.virtual_stages"});
    }
  }

  void Evaluation() {
    const v1::EvaluationSpec& evaluation = spec_.evaluation();
    const bool test_data = spec_.data().test_datasets_size() > 0;
    if (spec_.data().val_set_size() > 0 && test_data) {
      Add("data.val_set_size", "val_set_size and test_datasets contradict each other: remove one of them", {"data.test_datasets"});
    }
    if (!evaluation.has_early_stopping_patience()) return;
    if (spec_.data().val_set_size() <= 0 && !test_data) {
      Add("evaluation.early_stopping_patience", "early_stopping_patience needs evaluation rows: set data.val_set_size or data.test_datasets",
          {"data.val_set_size"});
    } else if (evaluation.eval_steps() == 0) {
      Add("evaluation.early_stopping_patience", "early_stopping_patience needs evaluations during training: set eval_steps to 1 or more",
          {"evaluation.eval_steps"});
    }
  }

  const v1::JobSpec& spec_;
  std::vector<Finding>* const out_;
};

}  // namespace

std::vector<Finding> FindAll(const v1::JobSpec& spec) {
  std::vector<Finding> findings;
  LeafChecker(&findings).Group(spec, "");
  std::set<std::string> wrong;
  for (const Finding& finding : findings) wrong.insert(finding.field);
  // A value that is wrong by itself is not blamed again for how it fits with others.
  std::vector<Finding> between;
  RuleChecker(spec, &between).Run();
  for (Finding& finding : between) {
    const bool repeated =
        wrong.count(finding.field) > 0 || std::any_of(finding.others.begin(), finding.others.end(), [&](const std::string& f) { return wrong.count(f) > 0; });
    if (!repeated) findings.push_back(std::move(finding));
  }
  return findings;
}

std::vector<v1::Violation> Check(const v1::JobSpec& spec) {
  std::vector<v1::Violation> violations;
  for (Finding& finding : FindAll(spec)) {
    v1::Violation violation;
    violation.set_field(std::move(finding.field));
    violation.set_message(std::move(finding.message));
    violations.push_back(std::move(violation));
  }
  return violations;
}

}  // namespace ppft::spec
