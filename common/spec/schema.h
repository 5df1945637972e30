// The one table of job.yaml: for each leaf of v1::JobSpec its kind, default, range and words. Parsing, checking, printing and hints all read it.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"
#include "ppft/v1/spec.pb.h"

namespace ppft::spec {

enum class Kind {
  kText,      // any text
  kName,      // text without control characters, limited in length
  kWord,      // one of `words`
  kWords,     // a list of `words`, no repeats, stored in the order of `words`
  kInt,       // within [low, high]; also in a field of type double
  kInts,      // a list of such
  kNumber,    // finite, within [low, high] or without the ends
  kBool,      // true | false
  kDuration,  // "300s", "5m", "2h"; the range in seconds
  kTextMap,   // word -> text
  kFixed,     // a key without a field in the message: only the default is accepted
};

struct Rule {
  const char* path;  // "data.datasets[].type"
  Kind kind;
  const char* fallback = "";     // the default as YAML; "": unset
  double low = 0, high = 0;      // kInt, kInts, kNumber, kDuration; kText, kName: `high` bytes; kTextMap: `high` entries
  const char* words = "";        // separated by blanks
  bool without_low = false;      // low itself is too little
  bool without_high = false;     // high itself is too much
  const char* zero_word = "";    // the word that stands for 0 ("auto", "dynamic"); the number 0 itself is out of range
  bool auto_is_default = false;  // "auto" means the same as leaving it out
  bool is_newer = false;         // kWord: clients of before it was there leave it empty, and mean the default
};

const std::vector<Rule>& Schema();
// By pattern ("data.datasets[].type"); null if there is none.
const Rule* FindRule(absl::string_view pattern);
// The words of a rule, split.
std::vector<std::string> WordsOf(const Rule& rule);
// Those that are supported (support.h): what a user is told to write.
std::vector<std::string> SupportedWordsOf(const Rule& rule);
// "a whole number from 1 to 1024", "one of a, b, c": what may be written there.
std::string Describe(const Rule& rule);

// Other names for a key: {"adapter", "lora_r"} -> "r". Accepted.
absl::string_view ResolveAlias(absl::string_view section, absl::string_view key);
// What a key of another trainer is called here, as a full path; "" if unknown. Only for hints.
std::string KnownElsewhere(absl::string_view key);

// A group of keys in job.yaml (a message that is neither a map entry nor a Duration).
bool IsGroup(const google::protobuf::FieldDescriptor* field);
// "data.datasets[3].type" -> "data.datasets[].type".
std::string PatternOf(absl::string_view path);
// "data" + "val_set_size" -> "data.val_set_size".
std::string Join(absl::string_view prefix, absl::string_view name);

// The keys that field_map may have for a dataset type; empty for a type that is not known. The defaults map each to itself.
std::vector<std::string> RolesOf(absl::string_view type);

}  // namespace ppft::spec
