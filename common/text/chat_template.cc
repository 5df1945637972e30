#include "common/text/chat_template.h"

#include <cstddef>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

extern "C" {
struct PpftRenderedText {
  size_t len;
  char* data;
};
int ppft_chat_render(const char* chat_template, size_t template_len, const char* variables, size_t variables_len, PpftRenderedText* out, char** error);
void ppft_rendered_free(PpftRenderedText* text);
void ppft_text_free(char* text);
}

namespace ppft::text {

absl::StatusOr<std::string> RenderChat(absl::string_view chat_template, absl::string_view variables_json) {
  PpftRenderedText rendered{};
  char* error = nullptr;
  if (ppft_chat_render(chat_template.data(), chat_template.size(), variables_json.data(), variables_json.size(), &rendered, &error) != 1) {
    const absl::Status status = absl::InvalidArgumentError(absl::StrCat("chat template: ", error));
    ppft_text_free(error);
    return status;
  }
  std::string text(rendered.data, rendered.len);
  ppft_rendered_free(&rendered);
  return text;
}

}  // namespace ppft::text
