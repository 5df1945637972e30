#include "common/spec/support.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace ppft::spec {
namespace {

enum class When { kIs, kIsNot };

struct Refusal {
  const char* pattern;
  When when;
  const char* value;  // words separated by blanks
  const char* remedy;
};

constexpr char kFormats[] = "use summarization, prompt_completion or completion";

constexpr Refusal kRefusals[] = {
    {"data.datasets[].type", When::kIs, "alpaca sharegpt messages", kFormats},
    {"data.test_datasets[].type", When::kIs, "alpaca sharegpt messages", kFormats},
    {"data.chat_template", When::kIsNot, "none tokenizer_default", "use none or tokenizer_default"},
    {"data.roles_to_train", When::kIsNot, "assistant", "leave it out or use [assistant]"},
    {"training.optimizer", When::kIsNot, "adamw", "use adamw"},
};

bool Among(absl::string_view value, const char* words) {
  for (const absl::string_view word : absl::StrSplit(words, ' ')) {
    if (word == value) return true;
  }
  return false;
}

bool Applies(const Refusal& refusal, absl::string_view value) {
  switch (refusal.when) {
    case When::kIs:
      return Among(value, refusal.value);
    case When::kIsNot:
      return !Among(value, refusal.value);
  }
  return false;
}

}  // namespace

std::string NotSupportedYet(absl::string_view pattern, absl::string_view value) {
  for (const Refusal& refusal : kRefusals) {
    if (pattern == refusal.pattern && Applies(refusal, value)) return absl::StrCat("\"", value, "\" is not supported yet: ", refusal.remedy);
  }
  return "";
}

}  // namespace ppft::spec
