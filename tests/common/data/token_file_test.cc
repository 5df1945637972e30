#include "common/data/token_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/common/data/token_file_bytes.h"

namespace ppft::data {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Example {
  std::vector<uint32_t> ids = {1, 5, 4294967295u, 1, 7};
  std::vector<uint8_t> supervised = {0, 1, 1, 0, 1};
  std::vector<int64_t> offsets = {0, 3, 5};
  std::vector<int64_t> numbers = {4, 9};

  std::string Bytes() const { return TokenFileBytes(TokenRows{ids, supervised, offsets, numbers}, {{"seed", "1"}, {"sources", "[\"ä\"]"}}); }
};

// Heap memory starts at a multiple of 8, as a mapping does.
absl::StatusOr<TokenFile> Parse(const std::string& bytes) {
  static std::vector<std::vector<uint64_t>> kept;
  std::vector<uint64_t>& words = kept.emplace_back((bytes.size() + 7) / 8);
  if (!bytes.empty()) std::memcpy(words.data(), bytes.data(), bytes.size());
  return ParseTokenFile(absl::string_view(reinterpret_cast<const char*>(words.data()), bytes.size()));
}

// The same file with another header.
std::string WithHeader(const std::string& bytes, const std::function<void(nlohmann::json&)>& edit) {
  uint64_t size;
  std::memcpy(&size, bytes.data(), 8);
  nlohmann::json header = nlohmann::json::parse(bytes.substr(8, size));
  edit(header);
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  size = text.size();
  uint64_t old_size;
  std::memcpy(&old_size, bytes.data(), 8);
  return std::string(reinterpret_cast<const char*>(&size), 8) + text + bytes.substr(8 + old_size);
}

TEST(TokenFileTest, RoundTrip) {
  const absl::StatusOr<TokenFile> file = Parse(Example().Bytes());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT(file->rows.ids, ElementsAre(1, 5, 4294967295u, 1, 7));
  EXPECT_THAT(file->rows.supervised, ElementsAre(0, 1, 1, 0, 1));
  EXPECT_THAT(file->rows.offsets, ElementsAre(0, 3, 5));
  EXPECT_THAT(file->rows.rows, ElementsAre(4, 9));
  EXPECT_EQ(file->rows.length(1), 2);
  EXPECT_EQ(file->rows.targets(0), 2);
  EXPECT_EQ(file->metadata.at("sources"), "[\"ä\"]");
}

TEST(TokenFileTest, EveryTruncationIsRefused) {
  const std::string bytes = Example().Bytes();
  for (size_t size = 0; size < bytes.size(); ++size) EXPECT_TRUE(absl::IsDataLoss(Parse(bytes.substr(0, size)).status())) << size;
}

TEST(TokenFileTest, WrongHeadersAreRefused) {
  struct Case {
    const char* what;
    std::function<void(nlohmann::json&)> edit;
  };
  const std::vector<Case> cases = {
      {"missing", [](nlohmann::json& h) { h.erase("ids"); }},
      {"dtype", [](nlohmann::json& h) { h["ids"]["dtype"] = "I32"; }},
      {"shape",
       [](nlohmann::json& h) {
         h["ids"]["shape"] = {5, 1};
       }},
      {"do not fit", [](nlohmann::json& h) { h["ids"]["shape"] = {6}; }},
      {"do not fit",
       [](nlohmann::json& h) {
         h["ids"]["data_offsets"] = {0, uint64_t{1} << 62};
       }},
      {"do not fit",
       [](nlohmann::json& h) {
         h["ids"]["data_offsets"] = {20, 0};
       }},
      {"data_offsets",
       [](nlohmann::json& h) {
         h["ids"]["data_offsets"] = {-4, 16};
       }},
      {"aligned",
       [](nlohmann::json& h) {
         h["ids"]["data_offsets"] = {1, 21};
       }},
      {"metadata",
       [](nlohmann::json& h) {
         h["__metadata__"] = {{"seed", 1}};
       }},
  };
  for (const Case& c : cases) EXPECT_THAT(Parse(WithHeader(Example().Bytes(), c.edit)).status().message(), HasSubstr(c.what));
}

TEST(TokenFileTest, WrongValuesAreRefused) {
  Example e;
  e.offsets = {0, 3, 4};
  EXPECT_THAT(Parse(e.Bytes()).status().message(), HasSubstr("offsets"));
  e = Example();
  e.offsets = {0, 5, 5};
  EXPECT_THAT(Parse(e.Bytes()).status().message(), HasSubstr("ascending"));
  e = Example();
  e.offsets = {0, int64_t{1} << 62, 5};
  EXPECT_THAT(Parse(e.Bytes()).status().message(), HasSubstr("ascending"));
  e = Example();
  e.supervised[2] = 7;
  EXPECT_THAT(Parse(e.Bytes()).status().message(), HasSubstr("supervised"));
  e = Example();
  e.numbers = {1};
  EXPECT_THAT(Parse(e.Bytes()).status().message(), HasSubstr("offsets"));
}

}  // namespace
}  // namespace ppft::data
