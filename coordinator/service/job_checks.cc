#include "coordinator/service/job_checks.h"

#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/model/config.h"
#include "common/net/status.h"
#include "common/spec/spec.h"
#include "common/spec/suggest.h"
#include "coordinator/core/planner/layout.h"

namespace ppft::coordinator {
namespace {

constexpr int kManyModels = 10000;

void Add(std::vector<v1::Violation>& violations, const std::string& field, const std::string& message) {
  v1::Violation violation;
  violation.set_field(field);
  violation.set_message(message);
  violations.push_back(std::move(violation));
}

bool IsDatasetId(const std::string& path) { return absl::StartsWith(path, "ds-"); }

void CheckModelName(const std::string& name, const SpecFacts& facts, std::vector<v1::Violation>& violations) {
  if (name.empty() || facts.model.has_value()) return;
  for (const v1::Violation& violation : violations) {
    if (violation.field() == "model.base_model") return;  // one sentence is enough
  }
  if (absl::StrContains(name, "..") || absl::StrContains(name, "/")) {
    return Add(violations, "model.base_model",
               absl::StrCat("\"", name, "\" is a path: name a registered model (register a folder under a model root with `ppctl models register`)"));
  }
  const std::string nearest = spec::NearestName(name, facts.model_names);
  const std::string hint = !nearest.empty()            ? absl::StrCat("did you mean \"", nearest, "\"?")
                           : facts.model_names.empty() ? "no model is registered yet: use `ppctl models register`"
                                                       : absl::StrCat("registered are: ", absl::StrJoin(facts.model_names, ", "));
  Add(violations, "model.base_model", absl::StrCat("no model \"", name, "\" is registered; ", hint));
}

void CheckAgainstModel(const v1::JobSpec& spec, const v1::ModelRecord& model, const std::set<std::string>& wrong, std::vector<v1::Violation>& violations) {
  const auto config = model::ParseModelConfig(model.config(), absl::StrCat(model.model().name(), "/config.json"));
  if (!config.ok()) return Add(violations, "model.base_model", std::string(config.status().message()));
  if (wrong.count("data.sequence_len") == 0 && spec.data().sequence_len() > config->max_position_embeddings) {
    Add(violations, "data.sequence_len",
        absl::StrCat(spec.data().sequence_len(), " is more than the ", config->max_position_embeddings, " positions of ", model.model().name(),
                     " (max_position_embeddings): use at most ", config->max_position_embeddings));
  }
  for (const v1::Violation& violation : CheckLayout(spec, *config, wrong)) violations.push_back(violation);
}

void CheckDatasets(const v1::JobSpec& spec, const SpecFacts& facts, bool uploaded, std::vector<v1::Violation>& violations) {
  const auto check = [&](const auto& datasets, const std::string& list) {
    for (int i = 0; i < datasets.size(); ++i) {
      const std::string& path = datasets[i].path();
      const std::string field = absl::StrCat("data.", list, "[", i, "].path");
      if (path.empty()) continue;  // spec::Check says so
      if (!IsDatasetId(path)) {
        if (uploaded) Add(violations, field, absl::StrCat("\"", path, "\" is not a dataset id (\"ds-…\"): upload the file first, as `ppctl submit` does"));
        continue;
      }
      if (const auto missing = facts.missing_datasets.find(path); missing != facts.missing_datasets.end()) Add(violations, field, missing->second);
    }
  };
  check(spec.data().datasets(), "datasets");
  check(spec.data().test_datasets(), "test_datasets");
}

// A wrong entry makes its list wrong: "parallel.layers_per_stage[1]".
std::set<std::string> FieldsOf(const std::vector<v1::Violation>& violations) {
  std::set<std::string> fields;
  for (const v1::Violation& violation : violations) {
    fields.insert(violation.field());
    if (absl::EndsWith(violation.field(), "]")) fields.insert(violation.field().substr(0, violation.field().rfind('[')));
  }
  return fields;
}

}  // namespace

absl::StatusOr<SpecFacts> GatherFacts(JobStore& store, const v1::JobSpec& spec) {
  SpecFacts facts;
  if (auto model = store.GetModel(spec.model().base_model()); model.ok()) {
    facts.model = *std::move(model);
  } else if (!absl::IsNotFound(model.status())) {
    return model.status();
  } else {
    PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Model> models, store.ListModels(Page{kManyModels, ""}));
    for (const v1::Model& known : models) facts.model_names.push_back(known.name());
  }
  for (const auto* datasets : {&spec.data().datasets(), &spec.data().test_datasets()}) {
    for (const v1::DatasetSpec& dataset : *datasets) {
      if (!IsDatasetId(dataset.path())) continue;
      const absl::Status found = store.GetDataset(dataset.path()).status();
      if (absl::IsNotFound(found)) facts.missing_datasets[dataset.path()] = std::string(found.message());
      if (!found.ok() && !absl::IsNotFound(found)) return found;
    }
  }
  if (const std::string& id = spec.model().init_adapter(); !id.empty()) {
    if (auto adapter = store.GetArtifact(id, "adapter"); adapter.ok()) {
      facts.init_adapter = *std::move(adapter);
    } else if (!absl::IsNotFound(adapter.status())) {
      return adapter.status();
    }
  }
  return facts;
}

std::vector<v1::Violation> CheckSpec(const v1::JobSpec& spec, const SpecFacts& facts, bool uploaded, const AdapterCheck& check_adapter,
                                     const ModelFilesCheck& check_model_files) {
  std::vector<v1::Violation> violations = spec::Check(spec);
  const std::set<std::string> wrong = FieldsOf(violations);
  const auto adapter_field = wrong.lower_bound("adapter.");
  const bool adapter_is_sound = adapter_field == wrong.end() || !absl::StartsWith(*adapter_field, "adapter.");
  CheckModelName(spec.model().base_model(), facts, violations);
  CheckDatasets(spec, facts, uploaded, violations);
  if (facts.model.has_value()) {
    const absl::Status unchanged = check_model_files(*facts.model);
    if (!unchanged.ok()) Add(violations, "model.base_model", std::string(unchanged.message()));
  }
  if (facts.model.has_value()) CheckAgainstModel(spec, *facts.model, wrong, violations);
  const std::string& adapter = spec.model().init_adapter();
  const bool is_id = absl::StartsWith(adapter, "adapter-") || absl::StartsWith(adapter, "job-");
  if (!adapter.empty() && !facts.init_adapter.has_value() && (is_id || uploaded)) {
    Add(violations, "model.init_adapter", absl::StrCat("no adapter \"", adapter, "\": give the id of a finished job or of an uploaded adapter"));
  }
  if (facts.init_adapter.has_value() && facts.model.has_value() && adapter_is_sound) {
    const absl::Status fits = check_adapter(*facts.init_adapter, *facts.model, spec.adapter());
    if (!fits.ok()) Add(violations, "model.init_adapter", std::string(fits.message()));
  }
  return violations;
}

absl::Status ViolationsStatus(const std::vector<v1::Violation>& violations) {
  if (violations.empty()) return absl::OkStatus();
  std::vector<std::string> lines;
  std::vector<net::FieldViolation> fields;
  for (const v1::Violation& violation : violations) {
    lines.push_back(absl::StrCat(violation.field(), ": ", violation.message()));
    fields.push_back({violation.field(), violation.message()});
  }
  absl::Status status = absl::InvalidArgumentError(absl::StrJoin(lines, "\n"));
  net::SetErrorInfo(&status, {"SPEC_INVALID", {}});
  net::SetFieldViolations(&status, fields);
  return status;
}

}  // namespace ppft::coordinator
