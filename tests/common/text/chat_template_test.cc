#include "common/text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/match.h"
#include "common/base/files.h"

namespace ppft::text {
namespace {

using ::testing::HasSubstr;

constexpr char kMessages[] = R"({"messages": [{"role": "user", "content": " hi <b> é\u0000 "}, {"role": "assistant", "content": "yes"}], "eos_token": "</s>"})";

std::string Render(const std::string& chat_template) {
  const absl::StatusOr<std::string> text = RenderChat(chat_template, kMessages);
  return text.ok() ? *text : std::string(text.status().message());
}

TEST(ChatTemplateTest, AsTransformersSetsJinjaUp) {
  EXPECT_EQ(Render("{% for m in messages %}\n    {% if loop.first %}\n[{{ m['content'].strip() }}]\n    {% endif %}\n{% endfor %}\n"),
            std::string("[hi <b> é\0]\n", 13));
  EXPECT_EQ(Render("{{ messages[1].content.upper() + eos_token }}"), "YES</s>");
  EXPECT_EQ(Render("{{ messages[1] | tojson }}"), R"({"role": "assistant", "content": "yes"})");
  EXPECT_EQ(Render("{{ {'a': '<é>'} | tojson(indent=2) }}"), "{\n  \"a\": \"<é>\"\n}");
  EXPECT_EQ(Render("{% for m in messages %}{% break %}{% endfor %}x{{ strftime_now is defined }}"), "xFalse");
}

TEST(ChatTemplateTest, ErrorsAreTheTemplatesOwnWords) {
  EXPECT_THAT(Render("{{ raise_exception('roles must alternate') }}"), HasSubstr("roles must alternate"));
  EXPECT_THAT(Render("a\n{% for %}"), HasSubstr("line 2"));
  EXPECT_THAT(Render("{{ messages.nothing.more }}"), HasSubstr("chat template"));
  EXPECT_FALSE(RenderChat("x", "{").ok());
}

TEST(ChatTemplateTest, EndlessTemplatesEnd) {
  EXPECT_THAT(Render("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}"), HasSubstr("fuel"));
  EXPECT_THAT(Render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), HasSubstr("chat template"));
}

// The contexts hold the arguments of tool calls as text. Most templates expect objects, and their goldens were made so; Hermes's wants the text.
std::string WithParsedArguments(const std::string& context) {
  nlohmann::ordered_json json = nlohmann::ordered_json::parse(context);
  for (auto& message : json["messages"]) {
    if (!message.contains("tool_calls")) continue;
    for (auto& call : message["tool_calls"]) {
      auto& arguments = call["function"]["arguments"];
      arguments = nlohmann::ordered_json::parse(arguments.get<std::string>());
    }
  }
  return json.dump();
}

// What Python's Jinja2 renders for real templates.
TEST(ChatTemplateTest, Goldens) {
  const char* assets = std::getenv("PPFT_ASSETS");
  const std::filesystem::path chat = std::filesystem::path(assets != nullptr ? assets : "../shared/assets") / "chat";
  if (!std::filesystem::exists(chat)) GTEST_SKIP() << "no chat templates in " << chat << " (set PPFT_ASSETS)";
  int compared = 0;
  for (const auto& entry : std::filesystem::directory_iterator(chat / "goldens")) {
    const std::string name = entry.path().stem();
    const size_t dash = name.rfind('-');
    const absl::StatusOr<std::string> chat_template = ReadFile(chat / "templates" / (name.substr(0, dash) + ".jinja"));
    const absl::StatusOr<std::string> context = ReadFile(chat / "contexts" / (name.substr(dash + 1) + ".json"));
    ASSERT_TRUE(chat_template.ok() && context.ok()) << name;
    const absl::StatusOr<std::string> text =
        RenderChat(*chat_template, absl::StartsWith(name, "NousResearch-Hermes") ? *context : WithParsedArguments(*context));
    EXPECT_EQ(text.ok() ? *text : std::string(text.status().message()), *ReadFile(entry.path())) << name;
    ++compared;
  }
  EXPECT_GT(compared, 30);
}

}  // namespace
}  // namespace ppft::text
