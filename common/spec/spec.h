// job.yaml <-> v1::JobSpec: parsing with positions, defaults, and the checks that need neither a model nor a dataset. The command line and the
// coordinator use the same. Pure: no I/O. Any thread.
//
// The fields, their types, ranges, words and defaults stand in one table (schema.cc); rules between fields in check.cc; what is refused until it
// works in support.cc.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "ppft/v1/job.pb.h"
#include "ppft/v1/spec.pb.h"

namespace ppft::spec {

constexpr size_t kMaxYamlBytes = 1 << 20;

// Where something was written: in the file (line and column from 1), or in an override ("--set a.b=c": then line is 0).
struct Position {
  std::string file;
  int line = 0;
  int column = 0;
};

struct FieldError {
  std::string file;
  int line = 0;
  int column = 0;
  std::string field;    // "data.datasets[0].type"; empty for errors of the text itself
  std::string message;  // what is wrong and what to do
};

// "job.yaml:3:5: adapter.r: 0 is out of range: use …"
std::string ToString(const FieldError& error);

struct ParseResult {
  v1::JobSpec spec;                           // complete and valid if there are no errors
  std::vector<FieldError> errors;             // all of them, by position
  std::vector<FieldError> warnings;           // settings without effect: the job is valid all the same
  std::set<std::string> wrong;                // fields and groups of `errors`, and those that a misspelt key meant: what `spec` holds there says nothing
  bool readable = true;                       // false: what follows a syntax error was not read
  std::set<std::string> given;                // fields that the file or an override sets: "training.max_steps"
  std::map<std::string, Position> positions;  // of every key and list item that was written
  std::string file;

  bool ok() const { return errors.empty(); }
  // Puts a violation found later (by the coordinator) at its place in the file: the field's key, else the nearest group around it.
  FieldError Locate(const v1::Violation& violation) const;
  // What can be judged though there are errors: the spec without the fields that are wrong. With no errors, the spec.
  v1::JobSpec Judgeable() const;
  // Of the violations that somebody else (the coordinator) found in `judged`, which is Judgeable() or less: those that `errors` does not imply, at their
  // places.
  std::vector<FieldError> News(const v1::JobSpec& judged, const google::protobuf::RepeatedPtrField<v1::Violation>& violations) const;
};

// `file` is only named in errors. Each override is "a.b=value" or "a.list[0].b=value", the value in YAML; null removes.
ParseResult Parse(const std::string& file, absl::string_view text, const std::vector<std::string>& overrides = {});

// The checks of Parse on a finished message, as the coordinator makes them. Empty: valid.
std::vector<v1::Violation> Check(const v1::JobSpec& spec);

// Gives fields that clients of earlier versions do not know, and leave empty, their defaults.
void FillNewerFields(v1::JobSpec* spec);

// precision.compute as it is on devices of `kind` (cpu | cuda).
std::string ComputeOn(absl::string_view compute, absl::string_view kind);

// The resolved job.yaml; Parse of it gives the same message. `comments`, by field, follow its value.
std::string ToYaml(const v1::JobSpec& spec, const std::map<std::string, std::string>& comments = {});

}  // namespace ppft::spec
