#include "worker/agent/file_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "worker/agent/devices.h"

namespace ppft::agent {
namespace {

using ::testing::HasSubstr;

v1::FileRef Ref(const std::string& content) {
  v1::FileRef file;
  file.set_name("file");
  file.set_sha256(Sha256Hex(content));
  file.set_size_bytes(static_cast<int64_t>(content.size()));
  return file;
}

class FileCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::temp_directory_path() / absl::StrCat("ppft-cache-test-", getpid());
    std::filesystem::remove_all(root_);
    ASSERT_TRUE(MakeDirs(root_ + "/rank").ok());
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  std::string root_;
};

bool Always() { return true; }

TEST_F(FileCacheTest, ACutDownloadGoesOnWhereItStopped) {
  const std::string content = "0123456789";
  std::vector<int64_t> offsets;
  FileCache cache(root_ + "/cache", 1000, [&](const std::string&, int64_t offset, bool, int fd) -> absl::Status {
    offsets.push_back(offset);
    const absl::Status written = WriteAll(fd, content.substr(static_cast<size_t>(offset), 4), "part");
    return offset + 4 < 10 ? absl::UnavailableError("cut") : written;
  });
  ASSERT_TRUE(cache.Open().ok());
  const auto path = cache.Fetch(Ref(content), root_ + "/rank", Always);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*ReadFile(*path), content);
  EXPECT_EQ(offsets, (std::vector<int64_t>{0, 4, 8}));
  EXPECT_EQ(cache.bytes(), 10);
}

TEST_F(FileCacheTest, ADamagedDownloadStartsOverAndIsNeverKept) {
  const std::string content = "0123456789";
  int calls = 0;
  FileCache cache(root_ + "/cache", 1000, [&](const std::string&, int64_t, bool check, int fd) {
    EXPECT_EQ(check, calls > 0) << "a copy that was wrong makes the coordinator look at its own";
    return WriteAll(fd, ++calls == 1 ? "012345678X" : content, "part");
  });
  ASSERT_TRUE(cache.Open().ok());
  const auto path = cache.Fetch(Ref(content), root_ + "/rank", Always);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*ReadFile(*path), content);
  EXPECT_EQ(calls, 2);
  FileCache always_wrong(root_ + "/other", 1000, [&](const std::string&, int64_t, bool, int fd) { return WriteAll(fd, "XXXXXXXXXX", "part"); });
  ASSERT_TRUE(always_wrong.Open().ok());
  EXPECT_EQ(always_wrong.Fetch(Ref(content), root_ + "/rank", Always).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(FileCacheTest, TwoFetchesShareOneDownload) {
  const std::string content(1000, 'a');
  std::atomic<int> calls = 0;
  FileCache cache(root_ + "/cache", 10000, [&](const std::string&, int64_t, bool, int fd) {
    ++calls;
    usleep(100000);
    return WriteAll(fd, content, "part");
  });
  ASSERT_TRUE(cache.Open().ok());
  ASSERT_TRUE(MakeDirs(root_ + "/rank2").ok());
  std::thread other([&] { EXPECT_TRUE(cache.Fetch(Ref(content), root_ + "/rank2", Always).ok()); });
  EXPECT_TRUE(cache.Fetch(Ref(content), root_ + "/rank", Always).ok());
  other.join();
  EXPECT_EQ(calls, 1);
}

TEST_F(FileCacheTest, TheLimitDropsFilesThatNoRankHolds) {
  std::string content;
  FileCache cache(root_ + "/cache", 250, [&](const std::string&, int64_t, bool, int fd) { return WriteAll(fd, content, "part"); });
  ASSERT_TRUE(cache.Open().ok());
  for (const char letter : {'a', 'b', 'c'}) {
    content = std::string(100, letter);
    const auto path = cache.Fetch(Ref(content), root_ + "/rank", Always);
    ASSERT_TRUE(path.ok()) << path.status();
    // The rank is gone: a may be dropped, b is held.
    if (letter == 'a') {
      ASSERT_EQ(unlink(path->c_str()), 0);
    }
  }
  EXPECT_FALSE(PathExists(absl::StrCat(root_, "/cache/", Sha256Hex(std::string(100, 'a')))));
  EXPECT_TRUE(PathExists(absl::StrCat(root_, "/cache/", Sha256Hex(std::string(100, 'b')))));
  EXPECT_EQ(cache.bytes(), 200);
}

TEST_F(FileCacheTest, AFetchThatIsNoLongerWantedEnds) {
  std::atomic<int> calls = 0;
  FileCache cache(root_ + "/cache", 250, [&](const std::string&, int64_t, bool, int) {
    ++calls;
    return absl::UnavailableError("away");
  });
  ASSERT_TRUE(cache.Open().ok());
  EXPECT_EQ(cache.Fetch(Ref("x"), root_ + "/rank", [&] { return calls < 2; }).status().code(), absl::StatusCode::kCancelled);
}

TEST(DevicesTest, FlagSaysHowManySlots) {
  const auto devices = OfferDevices("cpu:3", 2);
  ASSERT_TRUE(devices.ok());
  ASSERT_EQ(devices->size(), 3u);
  EXPECT_EQ((*devices)[2].id(), "cpu:2");
  EXPECT_EQ((*devices)[2].threads(), 2);
  EXPECT_GT((*devices)[2].memory_bytes(), 0);
  for (const std::string wrong : {"", "cpu", "cpu:0", "cpu:x", "cpu:-1", "tpu:1", "cpu:1:1", "cuda:all"}) {
    const auto refused = OfferDevices(wrong, 0);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument) << wrong;
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr("--devices")) << wrong;
  }
}

TEST(DevicesTest, TheRouteToLoopbackIsLoopback) {
  EXPECT_EQ(*RouteAddress("127.0.0.1:7070"), "127.0.0.1");
  EXPECT_FALSE(RouteAddress("no-port").ok());
}

}  // namespace
}  // namespace ppft::agent
