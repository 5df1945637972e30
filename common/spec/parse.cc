#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <tuple>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/spec/check.h"
#include "common/spec/notes.h"
#include "common/spec/overrides.h"
#include "common/spec/reader.h"
#include "common/spec/schema.h"
#include "common/spec/spec.h"
#include "common/spec/yaml_tree.h"

namespace ppft::spec {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

void CompleteDatasets(google::protobuf::RepeatedPtrField<v1::DatasetSpec>* datasets) {
  for (v1::DatasetSpec& dataset : *datasets) {
    if (dataset.source().empty()) dataset.set_source(dataset.path());
    for (const std::string& role : RolesOf(dataset.type())) {
      if (dataset.field_map().count(role) == 0) (*dataset.mutable_field_map())[role] = role;
    }
  }
}

// Defaults that follow from other fields.
void ApplyDependentDefaults(const std::set<std::string>& given, v1::JobSpec* spec) {
  v1::TrainingSpec* training = spec->mutable_training();
  if (!training->has_num_epochs() && !training->has_max_steps()) training->set_num_epochs(3);
  if (training->lr_scheduler() == "cosine_with_min_lr" && given.count("training.min_lr_ratio") == 0) training->set_min_lr_ratio(0.1);
  if (training->has_global_batch_size() && given.count("training.gradient_accumulation_steps") == 0) {
    const int per_round = training->micro_batch_size() * std::max(1, spec->parallel().data_parallel_size());
    if (per_round > 0 && training->global_batch_size() % per_round == 0) training->set_gradient_accumulation_steps(training->global_batch_size() / per_round);
  }
  CompleteDatasets(spec->mutable_data()->mutable_datasets());
  CompleteDatasets(spec->mutable_data()->mutable_test_datasets());
}

// A whole job as `ppctl get -o yaml` prints it: the spec within is meant, and what else is there is its state of then.
bool EnterSpecOfJob(Node* root) {
  const auto entry = [&](absl::string_view key) {
    return std::find_if(root->entries.begin(), root->entries.end(), [&](const Entry& e) { return e.key == key; });
  };
  const auto spec = entry("spec");
  if (spec == root->entries.end() || spec->value.kind != Node::Kind::kMap || entry("id") == root->entries.end() || entry("status") == root->entries.end())
    return false;
  Node inner = std::move(spec->value);
  *root = std::move(inner);
  return true;
}

// Settings that the user wrote and that change nothing.
class Warnings {
 public:
  explicit Warnings(ParseResult* result) : result_(result) {}

  void Run() {
    if (!result_->readable) return;
    Evaluation();
    LossScale();
    Replicas();
    Merged();
  }

 private:
  // `changes`: its value is not the one that it has anyway. Silent when a field that it hangs on is wrong itself.
  void Warn(const char* field, bool changes, const char* message, std::initializer_list<const char*> causes) {
    if (!changes || result_->given.count(field) == 0 || result_->wrong.count(field) > 0) return;
    for (const char* cause : causes) {
      if (result_->wrong.count(cause) > 0) return;
    }
    v1::Violation violation;
    violation.set_field(field);
    violation.set_message(message);
    result_->warnings.push_back(result_->Locate(violation));
  }

  void Evaluation() {
    if (spec().data().val_set_size() > 0 || spec().data().test_datasets_size() > 0) return;
    const std::pair<const char*, bool> settings[] = {{"evaluation.eval_steps", spec().evaluation().eval_steps() > 0},
                                                     {"evaluation.eval_on_start", spec().evaluation().eval_on_start()},
                                                     {"checkpoint.load_best_model_at_end", spec().checkpoint().load_best_model_at_end()}};
    for (const auto& [field, asks] : settings) {
      Warn(field, asks, "has no effect without evaluation rows: set data.val_set_size or data.test_datasets, or remove it",
           {"data", "data.val_set_size", "data.test_datasets"});
    }
  }

  void LossScale() {
    const v1::PrecisionSpec& precision = spec().precision();
    if (precision.compute() == "fp16") return;
    const v1::PrecisionSpec& defaults = Defaults().precision();
    const std::pair<const char*, bool> settings[] = {{"precision.loss_scale", precision.loss_scale() != defaults.loss_scale()},
                                                     {"precision.initial_scale_power", precision.initial_scale_power() != defaults.initial_scale_power()},
                                                     {"precision.loss_scale_window", precision.loss_scale_window() != defaults.loss_scale_window()},
                                                     {"precision.hysteresis", precision.hysteresis() != defaults.hysteresis()},
                                                     {"precision.min_loss_scale", precision.min_loss_scale() != defaults.min_loss_scale()},
                                                     {"precision.consecutive_hysteresis", precision.consecutive_hysteresis()}};
    for (const auto& [field, asks] : settings) {
      Warn(field, asks, "has no effect without precision.compute: fp16, the only one whose loss is scaled: set that, or remove it",
           {"precision", "precision.compute"});
    }
  }

  void Replicas() {
    const v1::ParallelSpec& parallel = spec().parallel();
    Warn("parallel.zero_stage", parallel.zero_stage() > 1 && parallel.data_parallel_size() <= 1,
         "has no effect with one replica, which has nobody to share with: set parallel.data_parallel_size to 2 or more, or remove it",
         {"parallel", "parallel.data_parallel_size"});
  }

  void Merged() {
    const auto& formats = spec().output().formats();
    Warn("output.merge_dtype", !spec().output().merge_dtype().empty() && std::find(formats.begin(), formats.end(), "merged") == formats.end(),
         "has no effect without a merged model: add merged to output.formats, or remove it", {"output", "output.formats"});
  }

  const v1::JobSpec& spec() const { return result_->spec; }

  ParseResult* const result_;
};

// Unsets the field or the group at `path`; entries of lists stay.
void Unset(Message* message, absl::string_view path) {
  const absl::string_view part = path.substr(0, path.find('.'));
  const absl::string_view name = part.substr(0, part.find('['));
  const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(std::string(name));
  if (field == nullptr) return;
  if (part.size() == path.size()) {
    if (name.size() == part.size()) message->GetReflection()->ClearField(message, field);
    return;
  }
  if (!IsGroup(field)) return;
  const absl::string_view rest = path.substr(part.size() + 1);
  if (!field->is_repeated()) return Unset(message->GetReflection()->MutableMessage(message, field), rest);
  int index;
  const absl::string_view digits = part.substr(name.size());
  if (digits.size() < 3 || !absl::SimpleAtoi(digits.substr(1, digits.size() - 2), &index)) return;
  if (index < 0 || index >= message->GetReflection()->FieldSize(*message, field)) return;
  Unset(message->GetReflection()->MutableRepeatedMessage(message, field, index), rest);
}

bool Same(const v1::Violation& a, const v1::Violation& b) { return a.field() == b.field() && a.message() == b.message(); }

}  // namespace

ParseResult Parse(const std::string& file, absl::string_view text, const std::vector<std::string>& overrides) {
  ParseResult result;
  result.file = file;
  std::vector<std::string> sources = {file};
  for (const std::string& override : overrides) sources.push_back(absl::StrCat("--set ", override));
  Notes notes(&result, sources);
  std::vector<TreeError> broken;
  Node root = ReadTree(text, 0, &broken);
  result.readable = broken.empty();
  const bool is_resolved = EnterSpecOfJob(&root);
  ApplyOverrides(overrides, &root, &broken);
  for (const TreeError& error : broken) notes.Add(error.mark, "", error.message);

  SetDefaults(&result.spec, &notes);
  ReadSpec(root, &result.spec, &notes);
  ApplyDependentDefaults(result.given, &result.spec);
  std::set<std::string> found;
  // What a damaged text lacks may only have been lost in reading it.
  for (const Finding& finding : FindAll(result.spec)) {
    const auto wrong = [&](const std::string& field) { return notes.is_wrong(field); };
    if (wrong(finding.field) || std::any_of(finding.others.begin(), finding.others.end(), wrong)) continue;
    if (!result.readable && result.given.count(finding.field) == 0) continue;
    v1::Violation violation;
    violation.set_field(finding.field);
    violation.set_message(finding.message);
    FieldError error = result.Locate(violation);
    if (result.positions.count(finding.field) == 0) {
      for (const std::string& other : finding.others) {
        const auto at = result.positions.find(other);
        if (at == result.positions.end()) continue;
        std::tie(error.file, error.line, error.column) = std::tie(at->second.file, at->second.line, at->second.column);
        break;
      }
    }
    result.errors.push_back(std::move(error));
    found.insert(finding.field);
    // A list of words or numbers is read as a whole.
    const std::string list = finding.field.substr(0, finding.field.rfind('['));
    if (absl::EndsWith(finding.field, "]") && FindRule(PatternOf(list)) != nullptr) found.insert(list);
  }
  result.wrong.merge(found);
  if (!is_resolved) Warnings(&result).Run();
  std::stable_sort(result.errors.begin(), result.errors.end(), [&](const FieldError& a, const FieldError& b) {
    return std::make_tuple(a.file != file, a.line, a.column) < std::make_tuple(b.file != file, b.line, b.column);
  });
  return result;
}

FieldError ParseResult::Locate(const v1::Violation& violation) const {
  std::string path = violation.field();
  while (!path.empty()) {
    const auto at = positions.find(path);
    if (at != positions.end()) return {at->second.file, at->second.line, at->second.column, violation.field(), violation.message()};
    const size_t cut = path.find_last_of(".[");
    path = cut == std::string::npos ? "" : path.substr(0, cut);
  }
  return {file, 1, 1, violation.field(), violation.message()};
}

v1::JobSpec ParseResult::Judgeable() const {
  v1::JobSpec judgeable = spec;
  for (const std::string& field : wrong) Unset(&judgeable, field);
  return judgeable;
}

std::vector<FieldError> ParseResult::News(const v1::JobSpec& judged, const google::protobuf::RepeatedPtrField<v1::Violation>& violations) const {
  const std::vector<v1::Violation> own = Check(judged);
  const auto is_wrong = [&](std::string path) {
    while (!path.empty()) {
      if (wrong.count(path) > 0) return true;
      const size_t cut = path.find_last_of(".[");
      path = cut == std::string::npos ? "" : path.substr(0, cut);
    }
    return false;
  };
  std::vector<FieldError> news;
  for (int i = 0; i < violations.size(); ++i) {
    const v1::Violation& violation = violations[i];
    const auto same = [&](const v1::Violation& other) { return Same(violation, other); };
    if (std::any_of(own.begin(), own.end(), same) || std::any_of(violations.begin(), violations.begin() + i, same)) continue;
    if (is_wrong(violation.field()) || (!readable && given.count(violation.field()) == 0)) continue;
    news.push_back(Locate(violation));
  }
  return news;
}

void FillNewerFields(v1::JobSpec* spec) {
  for (const Rule& rule : Schema()) {
    if (!rule.is_newer) continue;
    const absl::string_view path = rule.path;
    Message* message = spec;
    size_t start = 0;
    for (size_t dot; (dot = path.find('.', start)) != absl::string_view::npos; start = dot + 1) {
      message = message->GetReflection()->MutableMessage(message, message->GetDescriptor()->FindFieldByName(std::string(path.substr(start, dot - start))));
    }
    const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(std::string(path.substr(start)));
    if (message->GetReflection()->GetString(*message, field).empty()) message->GetReflection()->SetString(message, field, rule.fallback);
  }
}

std::string ComputeOn(absl::string_view compute, absl::string_view kind) {
  if (!compute.empty() && compute != "auto") return std::string(compute);
  return kind == "cuda" ? "bf16" : "fp32";
}

std::string ToString(const FieldError& error) {
  const std::string place = error.line > 0 ? absl::StrCat(error.file, ":", error.line, ":", error.column) : error.file;
  return absl::StrCat(place, ": ", error.field, error.field.empty() ? "" : ": ", error.message);
}

}  // namespace ppft::spec
