#include "common/spec/yaml_tree.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/spec/spec.h"

namespace ppft::spec {
namespace {

using ::testing::HasSubstr;

std::string Refusal(absl::string_view text) {
  std::vector<TreeError> errors;
  ReadTree(text, 0, &errors);
  std::string all;
  for (const TreeError& error : errors) absl::StrAppend(&all, error.mark.line, ":", error.mark.column, ": ", error.message, "\n");
  return all;
}

TEST(ReadTree, KeepsPositionsAndQuotes) {
  std::vector<TreeError> errors;
  const Node root = ReadTree("a: 1\nb:\n  - \"x\"\n  - {c: ~}\n", 0, &errors);
  ASSERT_TRUE(errors.empty());
  ASSERT_EQ(root.entries.size(), 2u);
  EXPECT_EQ(root.entries[1].mark.line, 2);
  const Node& list = root.entries[1].value;
  EXPECT_TRUE(list.items[0].quoted);
  EXPECT_FALSE(root.entries[0].value.quoted);
  EXPECT_EQ(list.items[1].entries[0].mark.line, 4);
  EXPECT_EQ(list.items[1].entries[0].mark.column, 6);
  EXPECT_EQ(list.items[1].entries[0].value.kind, Node::Kind::kNull);
}

TEST(ReadTree, RefusesWhatAJobFileDoesNotNeed) {
  EXPECT_THAT(Refusal("name: &a \"x\"\nb: 1\n"), HasSubstr("1:7: YAML anchors (&a) are not allowed"));
  EXPECT_THAT(Refusal("a: &x 1\nb: *x\n"), HasSubstr("2:4: YAML aliases"));
  EXPECT_THAT(Refusal("name: !!python/object/apply:os.system [\"true\"]\n"), HasSubstr("1:7: YAML tags"));
  EXPECT_THAT(Refusal("name: !!str 3\n"), HasSubstr("tags"));
  EXPECT_THAT(Refusal("a: 1\n---\nb: 2\n"), HasSubstr("2:1: a second document"));
  EXPECT_THAT(Refusal("name: [ {\nb: 1\n"), HasSubstr("not valid YAML"));
  EXPECT_THAT(Refusal("[a]: 1\n"), HasSubstr("a key must be a word"));
  EXPECT_THAT(Refusal(std::string("a: \0b\n", 6)), HasSubstr("1:4: byte 0x00 is not text"));
  EXPECT_THAT(Refusal("ok: 1\na: \xff\n"), HasSubstr("2:4: byte 0xff"));
  EXPECT_THAT(Refusal("a: \xed\xa0\x80\n"), HasSubstr("byte 0xed"));      // a surrogate
  EXPECT_THAT(Refusal("a: \xc0\xaf\n"), HasSubstr("byte 0xc0"));          // overlong
  EXPECT_THAT(Refusal("a: \xf4\x90\x80\x80\n"), HasSubstr("byte 0xf4"));  // beyond Unicode
  EXPECT_THAT(Refusal(std::string(kMaxYamlBytes + 1, ' ')), HasSubstr("at most 1048576"));
  EXPECT_EQ(Refusal("\xEF\xBB\xBF"
                    "a: \xc3\xa9 \xf0\x9f\x98\x80\n"),
            "");
}

TEST(ReadTree, DeepNestingEndsInAnError) {
  for (const size_t depth : {33u, 1000u, 1000000u}) {
    EXPECT_NE(Refusal(std::string(depth, '[')), "") << depth;
    EXPECT_NE(Refusal(absl::StrCat("a: ", std::string(depth, '{'))), "") << depth;
  }
  std::string block;
  for (int i = 0; i < 400; ++i) absl::StrAppend(&block, std::string(i, ' '), "a:\n");
  EXPECT_THAT(Refusal(block), HasSubstr("nested more than 32 levels"));
}

// Other people's YAML: none of it is a job, none may crash or be taken for one.
TEST(Parse, SurvivesTheYamlTestSuite) {
  const char* assets = std::getenv("PPFT_ASSETS");
  const std::string path = JoinPath(assets ? assets : "../shared/assets", "hostile/yaml_test_suite.jsonl");
  std::ifstream file(path);
  if (!file) GTEST_SKIP() << path << " is not here (set PPFT_ASSETS)";
  int inputs = 0;
  for (std::string line; std::getline(file, line); ++inputs) {
    const std::string text = nlohmann::json::parse(line)["yaml"];
    EXPECT_FALSE(Parse("job.yaml", text).ok()) << text;
  }
  EXPECT_GT(inputs, 300);
}

}  // namespace
}  // namespace ppft::spec
