#include <algorithm>
#include <iterator>
#include <tuple>
#include <utility>

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
void EnterSpecOfJob(Node* root) {
  const auto entry = [&](absl::string_view key) {
    return std::find_if(root->entries.begin(), root->entries.end(), [&](const Entry& e) { return e.key == key; });
  };
  const auto spec = entry("spec");
  if (spec == root->entries.end() || spec->value.kind != Node::Kind::kMap || entry("id") == root->entries.end() || entry("status") == root->entries.end())
    return;
  Node inner = std::move(spec->value);
  *root = std::move(inner);
}

}  // namespace

ParseResult Parse(const std::string& file, absl::string_view text, const std::vector<std::string>& overrides) {
  ParseResult result;
  result.file = file;
  std::vector<std::string> sources = {file};
  for (const std::string& override : overrides) sources.push_back(absl::StrCat("--set ", override));
  Notes notes(&result, sources);
  std::vector<TreeError> broken;
  Node root = ReadTree(text, 0, &broken);
  const bool readable = broken.empty();
  EnterSpecOfJob(&root);
  ApplyOverrides(overrides, &root, &broken);
  for (const TreeError& error : broken) notes.Add(error.mark, "", error.message);

  SetDefaults(&result.spec, &notes);
  ReadSpec(root, &result.spec, &notes);
  ApplyDependentDefaults(result.given, &result.spec);
  // What a damaged text lacks may only have been lost in reading it.
  for (const Finding& finding : FindAll(result.spec)) {
    const auto wrong = [&](const std::string& field) { return notes.is_wrong(field); };
    if (wrong(finding.field) || std::any_of(finding.others.begin(), finding.others.end(), wrong)) continue;
    if (!readable && result.given.count(finding.field) == 0) continue;
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
  }
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

std::string ToString(const FieldError& error) {
  const std::string place = error.line > 0 ? absl::StrCat(error.file, ":", error.line, ":", error.column) : error.file;
  return absl::StrCat(place, ": ", error.field, error.field.empty() ? "" : ": ", error.message);
}

}  // namespace ppft::spec
