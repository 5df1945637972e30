// What a spec must fulfil beyond spec::Check: the model, the datasets and the adapter that it names are there and belong together.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/controller.h"
#include "ppft/v1/artifact.pb.h"
#include "ppft/v1/job.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// What the store knows of the things that a spec names.
struct SpecFacts {
  std::optional<v1::ModelRecord> model;
  std::vector<std::string> model_names;                 // all, if `model` is unset
  std::map<std::string, std::string> missing_datasets;  // ids of the spec that no dataset has -> what to say of each
  std::optional<v1::ArtifactManifest> init_adapter;
};
absl::StatusOr<SpecFacts> GatherFacts(JobStore& store, const v1::JobSpec& spec);

// Reads the adapter's files: may it start this job? INVALID_ARGUMENT if not.
using AdapterCheck = std::function<absl::Status(const v1::ArtifactManifest&, const v1::ModelRecord&, const v1::AdapterSpec&)>;

// Are the model's files still what was registered? The message names file and remedy.
using ModelFilesCheck = std::function<absl::Status(const v1::ModelRecord&)>;

// All violations at once: those of spec::Check, and all others that do not hang on the fields which it finds wrong. `uploaded`: datasets must be ids of
// uploaded ones; otherwise a path that is not an id is let pass, to be uploaded later.
std::vector<v1::Violation> CheckSpec(const v1::JobSpec& spec, const SpecFacts& facts, bool uploaded, const AdapterCheck& check_adapter,
                                     const ModelFilesCheck& check_model_files);

// INVALID_ARGUMENT: "field: message", a line per violation, with the fields as details.
absl::Status ViolationsStatus(const std::vector<v1::Violation>& violations);

}  // namespace ppft::coordinator
