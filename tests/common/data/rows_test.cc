#include "common/data/rows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"

namespace ppft::data {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kGood[] = R"({"prompt":"a","completion":"b"})";

absl::Status Check(const std::string& bytes, const std::string& type = "prompt_completion", const std::map<std::string, std::string>& field_map = {}) {
  return MeasureRows("bad.jsonl", bytes, type, field_map).status();
}

std::vector<std::string> ReadAll(const std::string& bytes, const std::string& type = "prompt_completion") {
  absl::StatusOr<RowFormat> format = MakeRowFormat("rows.jsonl", type, {});
  EXPECT_TRUE(format.ok());
  RowReader reader(bytes, *format);
  std::vector<std::string> out;
  Row row;
  while (true) {
    const absl::StatusOr<bool> found = reader.Next(&row);
    if (!found.ok()) out.push_back(std::string(found.status().message()));
    if (!found.ok() || !*found) return out;
    out.push_back(absl::StrCat(row.number, ":", row.context, ":", row.answer));
  }
}

TEST(RowReaderTest, JsonLines) {
  EXPECT_THAT(ReadAll("{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"completion\":\"d\",\"prompt\":\"\",\"more\":[1,{\"x\":null}]}"),
              ElementsAre("1:a:b", "2::d"));
  EXPECT_THAT(ReadAll("{\"prompt\":\"a\",\"completion\":\"b\",\"more\":{\"prompt\":1,\"completion\":2}}"), ElementsAre("1:a:b"));
  EXPECT_THAT(ReadAll("\xEF\xBB\xBF{\"prompt\":\"a\",\"completion\":\"\\u00e4\\ud83d\\ude00\"}\r\n"), ElementsAre("1:a:ä😀"));
  EXPECT_THAT(ReadAll("{\"text\":\"t\"}\n", "completion"), ElementsAre("1::t"));
}

TEST(RowReaderTest, BlankLinesAreSkippedAndCounted) {
  EXPECT_THAT(ReadAll(absl::StrCat("\n", kGood, "\n  \t\r\n\n", kGood, "\n\n")), ElementsAre("2:a:b", "5:a:b"));
}

TEST(RowReaderTest, AListOfObjects) {
  EXPECT_THAT(ReadAll(absl::StrCat(" [\n", kGood, ",\n{\"prompt\":\"x ] , } \\\" \\\\\",\"completion\":\"y\"}\n]\n")),
              ElementsAre("1:a:b", "2:x ] , } \" \\:y"));
  EXPECT_THAT(ReadAll("[]"), ElementsAre());
}

struct BadCase {
  const char* what;
  std::string bytes;
  std::vector<std::string> words;
};

class BadRowsTest : public ::testing::TestWithParam<BadCase> {};

TEST_P(BadRowsTest, IsRefusedWithPlaceAndRemedy) {
  const absl::Status status = Check(GetParam().bytes);
  ASSERT_TRUE(absl::IsInvalidArgument(status)) << GetParam().what;
  EXPECT_TRUE(absl::StartsWith(status.message(), "bad.jsonl: ")) << status;
  for (const std::string& word : GetParam().words) EXPECT_THAT(status.message(), HasSubstr(word)) << GetParam().what;
  EXPECT_LT(status.message().size(), 600u);
  EXPECT_EQ(FindInvalidUtf8(status.message()), absl::string_view::npos);
}

const std::string kLine = absl::StrCat(kGood, "\n");

INSTANTIATE_TEST_SUITE_P(
    Cases, BadRowsTest,
    ::testing::Values(BadCase{"empty", "", {"the dataset is empty"}}, BadCase{"blank", " \n\n\t\n", {"the dataset is empty"}},
                      BadCase{"empty list", "[ ]", {"the dataset is empty"}},
                      BadCase{"broken JSON", kLine + kLine + "{\"prompt\": \n" + kLine, {"row 3", "not valid JSON"}},
                      BadCase{"two objects in a line", absl::StrCat(kGood, kGood), {"row 1", "not valid JSON"}},
                      BadCase{"missing", kLine + "{\"prompt\":\"a\"}\n", {"row 2", "field completion is missing", "\"prompt\"", "field_map"}},
                      BadCase{"misspelt", "{\"prompt\":\"a\",\"Completions\":\"b\"}", {"row 1", "did you mean \"Completions\"?"}},
                      BadCase{"no keys", "{}", {"row 1", "no keys"}},
                      BadCase{"a key twice", kLine + R"({"prompt":"a","completion":"b","prompt":"c"})", {"row 2", "the key \"prompt\" is there twice"}},
                      BadCase{"a key twice, spelt otherwise", R"([{"prompt":"a","\u0070rompt":"c","completion":"b"}])", {"row 1", "\"prompt\" is there twice"}},
                      BadCase{"wrong type", "{\"prompt\":[\"a\"],\"completion\":\"b\"}\n", {"row 1", "field prompt", "a list"}},
                      BadCase{"null", "{\"prompt\":\"a\",\"completion\":null}\n", {"row 1", "field completion", "null"}},
                      BadCase{"number", "{\"prompt\":\"a\",\"completion\":3}\n", {"row 1", "a number"}},
                      BadCase{"UTF-8", kLine + "{\"prompt\":\"\xff\xfe\",\"completion\":\"b\"}\n", {"row 2", "not valid UTF-8", "byte 12"}},
                      BadCase{"lone surrogate", "{\"prompt\":\"\\ud800\",\"completion\":\"b\"}\n", {"row 1", "not valid JSON"}},
                      BadCase{"empty answer", "{\"prompt\":\"a\",\"completion\":\"\"}\n", {"row 1", "field completion is empty"}},
                      BadCase{"deep", "{\"prompt\":" + std::string(100000, '[') + "\n", {"row 1", "nested deeper"}},
                      BadCase{"deep list", std::string(100000, '['), {"row 1", "nested deeper"}}, BadCase{"not an object", "\"text\"\n", {"row 1", "a string"}},
                      BadCase{"list of strings", "[\"a\"]", {"row 1", "a string"}}, BadCase{"unclosed list", absl::StrCat("[", kGood), {"row 1", "not closed"}},
                      BadCase{"double comma", absl::StrCat("[", kGood, ",,", kGood, "]"), {"row 2", "missing"}},
                      BadCase{"comma at the end", absl::StrCat("[", kGood, ",]"), {"row 2", "missing"}},
                      BadCase{"after the list", absl::StrCat("[", kGood, "] x"), {"follows"}},
                      BadCase{"too long", "{\"prompt\":\"" + std::string(kMaxRowBytes, 'a') + "\",\"completion\":\"b\"}", {"row 1", "16777216"}},
                      BadCase{"too long in a list", "[{\"prompt\":\"" + std::string(kMaxRowBytes, 'a') + "\",\"completion\":\"b\"}]", {"row 1", "16777216"}},
                      BadCase{"huge number", "{\"prompt\":\"a\",\"completion\":\"b\",\"x\":1e999}", {"row 1", "out of range"}},
                      BadCase{"hostile keys", "{\"" + std::string(5000, 'k') + "\":1,\"\\u0000\\n\":2}", {"row 1", "field prompt is missing"}}));

TEST(RowsTest, FieldMapNamesTheKeys) {
  EXPECT_TRUE(Check(R"({"dialogue":"a","summary":"b"})", "summarization", {{"document", "dialogue"}}).ok());
  EXPECT_THAT(Check(kGood, "summarization", {{"dokument", "a"}}).message(), HasSubstr("document and summary"));
  EXPECT_THAT(Check(kGood, "completion", {{"prompt", "a"}}).message(), HasSubstr("the roles of completion are text"));
  EXPECT_THAT(Check(kGood, "summarization", {{"document", "x"}, {"summary", "x"}}).message(), HasSubstr("two roles"));
  EXPECT_THAT(Check(kGood, "alpaca").message(), HasSubstr("not supported yet"));
}

TEST(Utf8Test, FindsTheFirstBadByte) {
  EXPECT_EQ(FindInvalidUtf8("aé€😀\x7f"), absl::string_view::npos);
  for (const char* bad :
       {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE2\x82", "\xFF"}) {
    EXPECT_EQ(FindInvalidUtf8(absl::StrCat("ab", bad)), 2u);
  }
}

// Every file of JSONTestSuite as a dataset and as the value of a field: nothing crashes, and no n_ file is taken for JSON.
TEST(HostileTest, JsonTestSuite) {
  const char* assets = std::getenv("PPFT_ASSETS");
  const std::filesystem::path folder = std::filesystem::path(assets != nullptr ? assets : "../shared/assets") / "hostile/JSONTestSuite/test_parsing";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "JSONTestSuite is not in " << folder << " (set PPFT_ASSETS)";
  int seen = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const absl::StatusOr<std::string> content = ReadFile(entry.path());
    ASSERT_TRUE(content.ok());
    const std::string name = entry.path().filename();
    EXPECT_FALSE(Check(*content).ok()) << name;  // none of them is a dataset
    const bool is_one_line = content->find('\n') == std::string::npos;
    if (is_one_line && !absl::StartsWith(name, "i_")) {
      const absl::Status status = Check(absl::StrCat("{\"prompt\":\"a\",\"completion\":\"b\",\"x\":", *content, "}"));
      // A lone "]}…" or a blank file changes meaning inside an object; those must be refused all the same.
      EXPECT_EQ(status.ok(), absl::StartsWith(name, "y_")) << name << ": " << status;
    }
    ++seen;
  }
  EXPECT_GT(seen, 250);
}

}  // namespace
}  // namespace ppft::data
