// Chat templates (chat_template.jinja, tokenizer_config.json) as transformers renders them, without a clock: strftime_now is not defined, so that a
// dataset renders the same on every day. Any thread.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft::text {

// `variables_json`: an object of the template's variables (messages, add_generation_prompt, bos_token, eos_token, tools …).
// INVALID_ARGUMENT: the template's own complaint (raise_exception), or a syntax error with its line; endless templates end with it too.
absl::StatusOr<std::string> RenderChat(absl::string_view chat_template, absl::string_view variables_json);

}  // namespace ppft::text
