#include "common/spec/support.h"

#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace ppft::spec {
namespace {

enum class When { kIs, kAbove, kIsNot };

struct Refusal {
  const char* pattern;
  When when;
  const char* value;  // kIs, kIsNot: words separated by blanks; kAbove: a number
  const char* remedy;
};

constexpr char kFormats[] = "use summarization, prompt_completion or completion";

constexpr Refusal kRefusals[] = {
    {"data.datasets[].type", When::kIs, "alpaca sharegpt messages", kFormats},
    {"data.test_datasets[].type", When::kIs, "alpaca sharegpt messages", kFormats},
    {"data.chat_template", When::kIsNot, "none tokenizer_default", "use none or tokenizer_default"},
    {"data.roles_to_train", When::kIsNot, "assistant", "leave it out or use [assistant]"},
    {"training.optimizer", When::kIsNot, "adamw", "use adamw"},
    {"precision.compute", When::kIs, "bf16 fp16", "use auto or fp32"},
    {"parallel.data_parallel_size", When::kAbove, "1", "use auto or 1"},
    {"parallel.zero_stage", When::kAbove, "1", "use 0 or 1"},
    {"parallel.activation_checkpointing", When::kIsNot, "none", "use none"},
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
    case When::kAbove: {
      double number, limit;
      return absl::SimpleAtod(value, &number) && absl::SimpleAtod(refusal.value, &limit) && number > limit;
    }
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
