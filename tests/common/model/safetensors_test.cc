// safetensors: a table of hostile headers, the writer, and the index.
#include "common/model/safetensors.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace {
int syncs = 0;            // of the disk, without the last one of a file
bool disk_fails = false;  // when it is asked
}  // namespace

// Instead of the C library's.
extern "C" int fdatasync(int fd) {
  ++syncs;
  if (!disk_fails) return static_cast<int>(syscall(SYS_fdatasync, fd));
  errno = EIO;
  return -1;
}

namespace ppft::model {
namespace {

using ::testing::HasSubstr;

std::string LittleEndian(uint64_t value) {
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[i] = static_cast<char>(value >> (8 * i));
  return out;
}

std::string WriteTemp(const std::string& bytes) {
  static int counter = 0;
  const std::string path = absl::StrCat(::testing::TempDir(), "ppft_safetensors_", ++counter, ".safetensors");
  EXPECT_TRUE(WriteFileAtomic(path, bytes).ok());
  return path;
}

absl::StatusOr<SafetensorsHeader> Read(const std::string& header, size_t data_bytes) {
  return ReadSafetensorsHeader(WriteTemp(LittleEndian(header.size()) + header + std::string(data_bytes, 'x')));
}

std::string Tensor(const std::string& name, const std::string& shape, int64_t begin, int64_t end, const std::string& dtype = "F32") {
  return absl::StrCat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":", shape, ",\"data_offsets\":[", begin, ",", end, "]}");
}

TEST(Safetensors, ReadsTensorsInAnyHeaderOrder) {
  const auto header = Read("{" + Tensor("b", "[2,1]", 8, 16) + ",\"__metadata__\":{\"format\":\"pt\",\"x\":\"\"}," + Tensor("a", "[2]", 0, 8) + "," +
                               Tensor("empty", "[0,3]", 16, 16) + "," + Tensor("scalar", "[]", 16, 18, "BF16") + "}   ",
                           18);
  ASSERT_TRUE(header.ok()) << header.status();
  ASSERT_EQ(header->tensors.size(), 4u);
  EXPECT_EQ(header->tensors[0].name, "a");
  EXPECT_EQ(header->Find("b")->offset, header->data_offset + 8);
  EXPECT_EQ(header->Find("scalar")->size_bytes, 2);
  EXPECT_EQ(header->Find("c"), nullptr);
  EXPECT_EQ(header->metadata.at("format"), "pt");
}

TEST(Safetensors, HostileHeadersAreRefusedWithTheirCause) {
  const std::string a = Tensor("a", "[2]", 0, 8);
  struct Case {
    std::string header;
    size_t data_bytes;
    const char* word;
  };
  const Case cases[] = {
      {"", 0, "not a JSON object"},
      {"[]", 0, "not a JSON object"},
      {" {}", 0, "not a JSON object"},
      {"{", 0, "JSON"},
      {"{}{}", 0, "JSON"},
      {"{" + a + "} x", 8, "JSON"},
      {"{" + a + "," + a + "}", 8, "overlap"},
      {"{" + a + "," + Tensor("b", "[2]", 0, 8) + "}", 8, "overlap"},
      {"{" + a + "," + Tensor("b", "[2]", 4, 12) + "}", 12, "overlap"},
      {"{" + Tensor("e", "[0]", 0, 0) + "," + Tensor("e", "[0]", 0, 0) + "}", 0, "twice"},
      {"{" + a + "," + Tensor("b", "[2]", 16, 24) + "}", 24, "belong to no tensor"},
      {"{" + Tensor("a", "[2]", 8, 16) + "}", 16, "belong to no tensor"},
      {"{" + a + "}", 9, "at the end belong to no tensor"},
      {"{}", 1, "at the end belong to no tensor"},
      {"{" + a + "}", 7, "truncated"},
      {"{" + Tensor("a", "[3]", 0, 8) + "}", 8, "needs 12 bytes"},
      {"{" + Tensor("a", "[2]", 8, 0) + "}", 8, "before it begins"},
      {"{" + Tensor("a", "[4611686018427387904,4]", 0, 8) + "}", 8, "too large"},
      {"{" + Tensor("a", "[9223372036854775807,9223372036854775807,0]", 0, 0) + "}", 0, "too large"},
      {"{" + Tensor("a", "[18446744073709551615]", 0, 8) + "}", 8, "too large"},
      {"{" + Tensor("a", "[99999999999999999999]", 0, 8) + "}", 8, "not an integer"},
      {"{" + Tensor("a", "[-2]", 0, 8) + "}", 8, "negative"},
      {"{" + Tensor("a", "[2.0]", 0, 8) + "}", 8, "not an integer"},
      {"{" + Tensor("a", "[1e400]", 0, 8) + "}", 8, "JSON"},
      {"{" + Tensor("a", "[\"2\"]", 0, 8) + "}", 8, "text where none belongs"},
      {"{" + Tensor("a", "[[2]]", 0, 8) + "}", 8, "list where none belongs"},
      {"{" + Tensor("a", "2", 0, 8) + "}", 8, "number where none belongs"},
      {"{" + Tensor("a", "[1,1,1,1,1,1,1,1,2]", 0, 8) + "}", 8, "dimensions"},
      {"{" + Tensor("a", "[2]", 0, 8, "F37") + "}", 8, "unknown"},
      {"{\"a\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "number where none belongs"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, "two data_offsets"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4,8]}}", 8, "two data_offsets"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "must have"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "twice"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"z\":1}}", 8, "unknown key"},
      {"{\"a\":{}}", 8, "must have"},
      {"{\"a\":null}", 8, "null"},
      {"{\"a\":{\"dtype\":{},\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "object where none belongs"},
      {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}," + a + "}", 8, "twice"},
      {"{\"__metadata__\":{},\"__metadata__\":{}," + a + "}", 8, "twice"},
      {"{\"__metadata__\":{\"a\":{}}," + a + "}", 8, "object where none belongs"},
      {"{\"__metadata__\":{\"a\":1}," + a + "}", 8, "number where none belongs"},
      {"{\"__metadata__\":[]," + a + "}", 8, "list where none belongs"},
      {"{\"a\xff\":1}", 0, "JSON"},
      {"{\"a\":" + std::string(100000, '['), 0, "list where none belongs"},
  };
  for (const Case& c : cases) {
    const auto header = Read(c.header, c.data_bytes);
    ASSERT_EQ(header.status().code(), absl::StatusCode::kInvalidArgument) << c.header.substr(0, 100);
    EXPECT_THAT(std::string(header.status().message()), HasSubstr(c.word)) << c.header.substr(0, 100);
    EXPECT_THAT(std::string(header.status().message()), HasSubstr(".safetensors: "));
  }
}

TEST(Safetensors, HeaderLengthIsCheckedBeforeItIsUsed) {
  for (const std::string& bytes :
       {std::string(), std::string("1234567"), LittleEndian(uint64_t{1} << 60) + "{}", LittleEndian(~uint64_t{0}) + "{}", LittleEndian(3) + "{}"}) {
    EXPECT_EQ(ReadSafetensorsHeader(WriteTemp(bytes)).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(ReadSafetensorsHeader("/nowhere/x.safetensors").status().code(), absl::StatusCode::kNotFound);
}

TEST(Safetensors, EveryTruncationOfAGoodFileIsRefused) {
  const std::string header = "{" + Tensor("a", "[2]", 0, 8) + "," + Tensor("b", "[1]", 8, 12) + "}";
  const std::string whole = LittleEndian(header.size()) + header + std::string(12, '\1');
  ASSERT_TRUE(ReadSafetensorsHeader(WriteTemp(whole)).ok());
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_EQ(ReadSafetensorsHeader(WriteTemp(whole.substr(0, size))).status().code(), absl::StatusCode::kInvalidArgument) << size;
  }
}

TEST(Safetensors, WriterRoundTripsAlignedAndDeterministic) {
  const std::vector<TensorInfo> tensors = {{"a \"quoted\" name", "F32", {2, 3}, 0, 0}, {"b", "BF16", {3}, 0, 0}, {"c", "F32", {0}, 0, 0}};
  std::string first;
  for (int run = 0; run < 2; ++run) {
    const std::string path = absl::StrCat(::testing::TempDir(), "ppft_writer.safetensors");
    auto writer = SafetensorsWriter::Create(path, tensors, {{"format", "pt"}});
    ASSERT_TRUE(writer.ok()) << writer.status();
    ASSERT_TRUE(writer->Append(std::string(20, 'a')).ok());
    EXPECT_EQ(SafetensorsWriter(std::move(*writer)).Finish().status().code(), absl::StatusCode::kInternal);  // bytes are missing
    writer = SafetensorsWriter::Create(path, tensors, {{"format", "pt"}});
    ASSERT_TRUE(writer->Append(std::string(20, 'a')).ok());
    ASSERT_TRUE(writer->Append(std::string(10, 'b')).ok());
    EXPECT_EQ(writer->Append("x").code(), absl::StatusCode::kInternal);
    const auto sha = writer->Finish();
    ASSERT_TRUE(sha.ok()) << sha.status();
    const std::string bytes = *ReadFile(path);
    EXPECT_EQ(*sha, Sha256Hex(bytes));
    EXPECT_EQ(static_cast<int64_t>(bytes.size()), writer->file_bytes());
    const auto header = ReadSafetensorsHeader(path);
    ASSERT_TRUE(header.ok()) << header.status();
    EXPECT_EQ(header->data_offset % 8, 0);
    EXPECT_EQ(header->Find("b")->offset, header->data_offset + 24);
    EXPECT_EQ(header->Find("a \"quoted\" name")->shape, (std::vector<int64_t>{2, 3}));
    if (run == 0) first = bytes;
    EXPECT_EQ(bytes, first);
  }
}

TEST(Safetensors, ALongFileGoesToTheDiskWhileItIsWritten) {
  const std::string path = absl::StrCat(::testing::TempDir(), "ppft_long.safetensors");
  const std::vector<TensorInfo> tensors = {{"long", "U8", {SafetensorsWriter::kUnsyncedBytes + 1}, 0, 0}};
  const std::string all(static_cast<size_t>(SafetensorsWriter::kUnsyncedBytes + 1), 'l');
  for (const bool fails : {false, true}) {
    syncs = 0;
    disk_fails = fails;
    auto writer = SafetensorsWriter::Create(path, tensors, {});
    ASSERT_TRUE(writer.ok()) << writer.status();
    const absl::Status appended = writer->Append(all);
    EXPECT_EQ(syncs, 1);
    EXPECT_EQ(appended.ok(), !fails) << appended;
    if (fails) continue;
    ASSERT_TRUE(writer->Finish().ok());
    const auto header = ReadSafetensorsHeader(path);
    ASSERT_TRUE(header.ok()) << header.status();
    EXPECT_EQ(header->Find("long")->size_bytes, static_cast<int64_t>(all.size()));
  }
  disk_fails = false;
  EXPECT_TRUE(RemoveAll(path).ok());
}

TEST(Safetensors, EmptyFileOfNoTensors) {
  EXPECT_TRUE(ReadSafetensorsHeader(WriteTemp(SafetensorsHeaderBytes({}, {}))).ok());
  EXPECT_TRUE(ReadSafetensorsHeader(WriteTemp(SafetensorsHeaderBytes({}, {{"format", "pt"}}))).ok());
}

TEST(SafetensorsIndex, RoundTripAndRefusals) {
  const std::map<std::string, std::string> map = {{"a", "model-00001-of-00002.safetensors"}, {"b", "model-00002-of-00002.safetensors"}};
  const auto read = ParseSafetensorsIndex(SafetensorsIndexText(map, 12), "index");
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, map);
  for (const char* text : {"{}", "[]", "{\"weight_map\":[]}", "{\"weight_map\":{\"a\":1}}", "{\"weight_map\":{\"a\":\"../x\"}}",
                           "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "{\"weight_map\":{\"a\":\"\"}}", "{\"weight_map\":{\"a\":\".\"}}",
                           "{\"weight_map\":{\"a\":\"x\",\"a\":\"y\"}}", "{\"weight_map\":{\"a\":\"x\\u0000y\"}}"}) {
    EXPECT_EQ(ParseSafetensorsIndex(text, "index").status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace ppft::model
