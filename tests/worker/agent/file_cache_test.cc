#include "worker/agent/file_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <condition_variable>
#include <filesystem>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "worker/agent/devices.h"

namespace ppft::agent {
namespace {

using ::testing::HasSubstr;

constexpr int kDownloads = 3;

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
  FileCache cache(root_ + "/cache", 1000, kDownloads, [&](const std::string&, int64_t offset, bool, const FileCache::Sink& sink) -> absl::Status {
    offsets.push_back(offset);
    const absl::Status written = sink(content.substr(static_cast<size_t>(offset), 4));
    return offset + 4 < 10 ? absl::UnavailableError("cut") : written;
  });
  ASSERT_TRUE(cache.Open("boot").ok());
  const auto path = cache.Fetch(Ref(content), root_ + "/rank", Always);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*ReadFile(*path), content);
  EXPECT_EQ(offsets, (std::vector<int64_t>{0, 4, 8}));
  EXPECT_EQ(cache.bytes(), 10);
}

TEST_F(FileCacheTest, ADamagedDownloadStartsOverAndIsNeverKept) {
  const std::string content = "0123456789";
  int calls = 0;
  FileCache cache(root_ + "/cache", 1000, kDownloads, [&](const std::string&, int64_t, bool check, const FileCache::Sink& sink) {
    EXPECT_EQ(check, calls > 0) << "a copy that was wrong makes the coordinator look at its own";
    return sink(++calls == 1 ? "012345678X" : content);
  });
  ASSERT_TRUE(cache.Open("boot").ok());
  const auto path = cache.Fetch(Ref(content), root_ + "/rank", Always);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*ReadFile(*path), content);
  EXPECT_EQ(calls, 2);
  FileCache always_wrong(root_ + "/other", 1000, kDownloads,
                         [&](const std::string&, int64_t, bool, const FileCache::Sink& sink) { return sink("0000000000"); });
  ASSERT_TRUE(always_wrong.Open("boot").ok());
  EXPECT_EQ(always_wrong.Fetch(Ref(content), root_ + "/rank", Always).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(FileCacheTest, TwoFetchesShareOneDownload) {
  const std::string content(1000, 'a');
  std::atomic<int> calls = 0;
  FileCache cache(root_ + "/cache", 10000, kDownloads, [&](const std::string&, int64_t, bool, const FileCache::Sink& sink) {
    ++calls;
    usleep(100000);
    return sink(content);
  });
  ASSERT_TRUE(cache.Open("boot").ok());
  ASSERT_TRUE(MakeDirs(root_ + "/rank2").ok());
  std::thread other([&] { EXPECT_TRUE(cache.Fetch(Ref(content), root_ + "/rank2", Always).ok()); });
  EXPECT_TRUE(cache.Fetch(Ref(content), root_ + "/rank", Always).ok());
  other.join();
  EXPECT_EQ(calls, 1);
}

TEST_F(FileCacheTest, TheLimitDropsFilesThatNoRankHolds) {
  std::string content;
  FileCache cache(root_ + "/cache", 250, kDownloads, [&](const std::string&, int64_t, bool, const FileCache::Sink& sink) { return sink(content); });
  ASSERT_TRUE(cache.Open("boot").ok());
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
  FileCache cache(root_ + "/cache", 250, kDownloads, [&](const std::string&, int64_t, bool, const FileCache::Sink&) {
    ++calls;
    return absl::UnavailableError("away");
  });
  ASSERT_TRUE(cache.Open("boot").ok());
  EXPECT_EQ(cache.Fetch(Ref("x"), root_ + "/rank", [&] { return calls < 2; }).status().code(), absl::StatusCode::kCancelled);
}

TEST_F(FileCacheTest, AllFilesComeSeveralAtOnceTheLargestFirst) {
  std::map<std::string, std::string> contents;
  std::vector<v1::FileRef> files;
  for (int i = 0; i < 12; ++i) {
    const std::string content(static_cast<size_t>(100 + 10 * i), static_cast<char>('a' + i));
    files.push_back(Ref(content));
    contents[files.back().sha256()] = content;
  }
  files.push_back(files[0]);  // tensors may share their bytes
  std::mutex mutex;
  std::condition_variable changed;
  int now = 0, most = 0, calls = 0;
  std::set<int64_t> first;
  FileCache cache(root_ + "/cache", 100000, kDownloads, [&](const std::string& sha256, int64_t, bool, const FileCache::Sink& sink) {
    const std::string& content = contents.at(sha256);
    {
      std::unique_lock<std::mutex> lock(mutex);
      most = std::max(most, ++now);
      if (++calls <= kDownloads) first.insert(static_cast<int64_t>(content.size()));
      changed.notify_all();
      changed.wait(lock, [&] { return calls >= kDownloads; });  // hangs if they come one by one
    }
    const absl::Status status = sink(content);
    std::lock_guard<std::mutex> lock(mutex);
    --now;
    return status;
  });
  ASSERT_TRUE(cache.Open("boot").ok());
  const auto totals = cache.FetchAll(files, root_ + "/rank", Always);
  ASSERT_TRUE(totals.ok()) << totals.status();
  EXPECT_EQ(totals->files, 12);
  EXPECT_EQ(totals->bytes, 12 * 100 + 10 * 66);
  EXPECT_EQ(totals->downloaded_bytes, totals->bytes);
  EXPECT_EQ(calls, 12);
  EXPECT_EQ(most, kDownloads);
  EXPECT_EQ(first, (std::set<int64_t>{190, 200, 210}));
  for (const auto& [sha256, content] : contents) EXPECT_EQ(*ReadFile(absl::StrCat(root_, "/rank/", sha256)), content);
  ASSERT_TRUE(MakeDirs(root_ + "/rank2").ok());
  const auto again = cache.FetchAll(files, root_ + "/rank2", Always);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->downloaded_bytes, 0);
  EXPECT_EQ(calls, 12);
}

TEST_F(FileCacheTest, TheFirstErrorOfManyEndsTheRestAndIsTheAnswer) {
  std::vector<v1::FileRef> files;
  for (int i = 0; i < 20; ++i) files.push_back(Ref(std::string(static_cast<size_t>(10 + i), 'x')));
  std::atomic<int> calls = 0;
  FileCache cache(root_ + "/cache", 100000, kDownloads, [&](const std::string&, int64_t, bool, const FileCache::Sink&) {
    ++calls;
    return absl::FailedPreconditionError("the model has changed");
  });
  ASSERT_TRUE(cache.Open("boot").ok());
  const auto totals = cache.FetchAll(files, root_ + "/rank", Always);
  EXPECT_EQ(totals.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(totals.status().message()), HasSubstr("the model has changed"));
  EXPECT_LE(calls, kDownloads);
}

TEST_F(FileCacheTest, AFullDiskEndsTheFetchAndTheNextOneGoesOn) {
  const std::string content = "0123456789";
  std::vector<int64_t> offsets;
  FileCache cache(root_ + "/cache", 1000, kDownloads, [&](const std::string&, int64_t offset, bool, const FileCache::Sink& sink) -> absl::Status {
    offsets.push_back(offset);
    if (offset > 0) return sink(content.substr(static_cast<size_t>(offset)));
    EXPECT_TRUE(sink(content.substr(0, 6)).ok());
    return absl::ResourceExhaustedError("No space left on device");
  });
  ASSERT_TRUE(cache.Open("boot").ok());
  EXPECT_EQ(cache.Fetch(Ref(content), root_ + "/rank", Always).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(PathExists(absl::StrCat(root_, "/cache/", Sha256Hex(content))));
  const auto path = cache.Fetch(Ref(content), root_ + "/rank", Always);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*ReadFile(*path), content);
  EXPECT_EQ(offsets, (std::vector<int64_t>{0, 6}));
}

TEST_F(FileCacheTest, MoreBytesThanTheFileHasAreRefused) {
  FileCache cache(root_ + "/cache", 1000, kDownloads, [&](const std::string&, int64_t, bool, const FileCache::Sink& sink) { return sink("0123456789X"); });
  ASSERT_TRUE(cache.Open("boot").ok());
  EXPECT_EQ(cache.Fetch(Ref("0123456789"), root_ + "/rank", Always).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(FileCacheTest, AfterACrashOfTheHostFilesAreHashedBeforeTheirFirstUse) {
  const std::string good(100, 'g'), torn(100, 't');
  std::vector<std::string> fetched;
  const auto download = [&](const std::string& sha256, int64_t, bool, const FileCache::Sink& sink) {
    const std::string& content = sha256 == Sha256Hex(good) ? good : torn;
    fetched.push_back(content);
    return sink(content);
  };
  const std::string cached = root_ + "/cache/";
  {
    FileCache cache(root_ + "/cache", 1000, kDownloads, download);
    ASSERT_TRUE(cache.Open("boot 1").ok());
    ASSERT_TRUE(cache.FetchAll({Ref(good), Ref(torn)}, root_ + "/rank", Always).ok());
  }
  std::filesystem::remove_all(root_ + "/rank");
  // What the crash left: the names, but not all bytes.
  std::filesystem::resize_file(cached + Sha256Hex(torn), 0);
  std::filesystem::resize_file(cached + Sha256Hex(torn), 100);
  fetched.clear();
  for (const char* boot : {"boot 2", "boot 2"}) {  // restarted before any use: still not trusted
    FileCache cache(root_ + "/cache", 1000, kDownloads, download);
    ASSERT_TRUE(cache.Open(boot).ok());
    EXPECT_EQ(cache.bytes(), 200);
    EXPECT_FALSE(PathExists(cached + Sha256Hex(good)));
  }
  FileCache cache(root_ + "/cache", 1000, kDownloads, download);
  ASSERT_TRUE(cache.Open("boot 2").ok());
  ASSERT_TRUE(MakeDirs(root_ + "/rank").ok());
  const auto totals = cache.FetchAll({Ref(good), Ref(torn)}, root_ + "/rank", Always);
  ASSERT_TRUE(totals.ok()) << totals.status();
  EXPECT_EQ(totals->downloaded_bytes, 100);
  EXPECT_EQ(fetched, std::vector<std::string>{torn});
  EXPECT_EQ(*ReadFile(root_ + "/rank/" + Sha256Hex(good)), good);
  EXPECT_EQ(*ReadFile(root_ + "/rank/" + Sha256Hex(torn)), torn);
  EXPECT_EQ(cache.bytes(), 200);
}

TEST_F(FileCacheTest, AFolderThatWasDeletedUnderItIsMadeAgain) {
  const std::string content(100, 'a'), other(50, 'b');
  FileCache cache(root_ + "/cache", 1000, kDownloads,
                  [&](const std::string& sha256, int64_t, bool, const FileCache::Sink& sink) { return sink(sha256 == Sha256Hex(content) ? content : other); });
  ASSERT_TRUE(cache.Open("boot").ok());
  ASSERT_TRUE(cache.Fetch(Ref(content), root_ + "/rank", Always).ok());
  std::filesystem::remove_all(root_ + "/cache");
  const auto path = cache.Fetch(Ref(other), root_ + "/rank", Always);
  ASSERT_TRUE(path.ok()) << path.status();
  EXPECT_EQ(*ReadFile(*path), other);
  EXPECT_EQ(cache.bytes(), 50);
  EXPECT_EQ(*ReadFile(root_ + "/cache/boot"), "boot") << "else the next process hashes all of it again";
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
