#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/file.h>

#include <filesystem>

#include "common/base/files.h"
#include "common/base/sha256.h"
#include "tests/clients/ppctl/fake_coordinator.h"

namespace ppft::ctl {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FetchTest : public ::testing::Test {
 protected:
  FetchTest() : target_(folder_ / "final_model") {
    coordinator_.list = {MakeJob("job-1", v1::JOB_STATE_SUCCEEDED)};
    coordinator_.manifest.set_id("job-1");
    Add("trainer_state.json", "{}");
    Add("adapter_model.safetensors", std::string(10000, 'x') + "end");
  }

  void Add(const std::string& name, const std::string& content) {
    v1::FileRef* file = coordinator_.manifest.add_files();
    file->set_name(name);
    file->set_sha256(Sha256Hex(content));
    file->set_size_bytes(static_cast<int64_t>(content.size()));
    coordinator_.contents[file->sha256()] = content;
  }

  Outcome Fetch(std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {"fetch", "job-1", "-o", target_};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Ppctl(coordinator_, arguments);
  }

  std::vector<std::string> Left() { return ListDir(folder_ / "").value(); }

  FakeCoordinator coordinator_;
  TempFolder folder_;
  const std::string target_;
};

TEST_F(FetchTest, PutsTheWholeFolderInPlace) {
  const Outcome run = Fetch();
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.out, target_ + "\n");
  EXPECT_EQ(ReadAll(target_ + "/adapter_model.safetensors"), std::string(10000, 'x') + "end");
  EXPECT_THAT(ListDir(target_).value(), ElementsAre("adapter_model.safetensors", "manifest.json", "trainer_state.json"));
  EXPECT_THAT(Left(), ElementsAre("final_model"));
}

TEST_F(FetchTest, ACutStreamGoesOnWhereItWasCut) {
  coordinator_.manifest.mutable_files()->DeleteSubrange(0, 1);
  coordinator_.cut_download_after = 4000;
  const Outcome run = Fetch();
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(coordinator_.download_offsets, ElementsAre(0, 4000));
}

TEST_F(FetchTest, ALaterFetchGoesOnWhereTheFirstEnded) {
  coordinator_.cut_download_after = 4000;
  coordinator_.Fail("Download", grpc::StatusCode::OK);
  coordinator_.manifest.mutable_files()->SwapElements(0, 1);
  // The first stream is cut after 4,000 bytes; the next one is refused for good.
  coordinator_.Fail("Download", grpc::StatusCode::INTERNAL);
  EXPECT_EQ(Fetch().code, 1);
  EXPECT_THAT(Left(), ElementsAre("final_model.partial"));
  coordinator_.download_offsets.clear();
  ASSERT_EQ(Fetch().code, 0);
  EXPECT_THAT(coordinator_.download_offsets, ElementsAre(4000, 0));
  EXPECT_EQ(ReadAll(target_ + "/adapter_model.safetensors"), std::string(10000, 'x') + "end");
}

TEST_F(FetchTest, DamagedBytesAreRefused) {
  for (auto& [sha, content] : coordinator_.contents) content[content.size() / 2] ^= 1;
  const Outcome run = Fetch();
  EXPECT_EQ(run.code, 1);
  EXPECT_THAT(run.err, HasSubstr("arrived damaged twice"));
  EXPECT_FALSE(fs::exists(target_));
}

TEST_F(FetchTest, DamageOnDiskIsRepairedByASecondTry) {
  const std::string content(10000, 'x');
  folder_.Write("final_model.partial/adapter_model.safetensors.part", std::string(5000, 'y'));
  ASSERT_EQ(Fetch().code, 0);
  EXPECT_EQ(ReadAll(target_ + "/adapter_model.safetensors"), content + "end");
}

TEST_F(FetchTest, OverlongStreamsAreRefused) {
  coordinator_.contents[coordinator_.manifest.files(1).sha256()] += "more";
  EXPECT_EQ(Fetch().code, 1);
  EXPECT_FALSE(fs::exists(target_));
}

TEST_F(FetchTest, RefusesToOverwriteWithoutForce) {
  folder_.Write("final_model/trainer_state.json", "old");
  folder_.Write("final_model/other.txt", "old");
  Outcome run = Fetch();
  EXPECT_EQ(run.code, 7);
  EXPECT_THAT(run.err, HasSubstr("--force"));
  EXPECT_EQ(ReadAll(target_ + "/trainer_state.json"), "old");
  ASSERT_EQ(Fetch({"--force"}).code, 0);
  EXPECT_EQ(ReadAll(target_ + "/trainer_state.json"), "{}");
  EXPECT_FALSE(fs::exists(target_ + "/other.txt"));
  EXPECT_THAT(Left(), ElementsAre("final_model"));
}

TEST_F(FetchTest, ForceReplacesOnlyFetchedModels) {
  folder_.Write("final_model/thesis.tex", "precious");
  const Outcome run = Fetch({"--force"});
  EXPECT_EQ(run.code, 7);
  EXPECT_EQ(ReadAll(target_ + "/thesis.tex"), "precious");
}

TEST_F(FetchTest, AnEmptyFolderIsFilled) {
  fs::create_directory(target_);
  EXPECT_EQ(Fetch().code, 0);
}

TEST_F(FetchTest, NamesThatLeaveTheFolderAreRefused) {
  for (const char* name : {"../evil", "/etc/evil", "a/b", "", ".bashrc", "..", "trainer_state.json"}) {
    coordinator_.manifest.clear_files();
    Add("trainer_state.json", "{}");
    Add(name, "x");
    EXPECT_EQ(Fetch().code, 1) << name;
    EXPECT_TRUE(Left().empty()) << name;
  }
}

TEST_F(FetchTest, TwoFetchesIntoOneFolderDoNotMix) {
  const std::string lock = folder_.Write("final_model.partial/.lock", "");
  Fd other(::open(lock.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::flock(other.get(), LOCK_EX), 0);
  const Outcome run = Fetch();
  EXPECT_EQ(run.code, 7);
  EXPECT_THAT(run.err, HasSubstr("another ppctl fetch"));
}

TEST_F(FetchTest, WrongOptionsAndUnfinishedJobs) {
  EXPECT_EQ(Fetch({"--type", "gguf"}).code, 2);
  EXPECT_EQ(Fetch({"--checkpoint", "newest"}).code, 2);
  EXPECT_EQ(Fetch({"--checkpoint", "step:x"}).code, 2);
  EXPECT_EQ(Fetch({"--checkpoint", "step:20"}).code, 0);
  coordinator_.Fail("GetManifest", grpc::StatusCode::FAILED_PRECONDITION, "the job is still running");
  EXPECT_EQ(Ppctl(coordinator_, {"fetch", "job-1", "-o", folder_ / "b"}).code, 7);
  EXPECT_EQ(Ppctl(coordinator_, {"fetch", "job-2", "-o", folder_ / "b"}).code, 3);
  EXPECT_FALSE(fs::exists(folder_ / "b"));
}

}  // namespace
}  // namespace ppft::ctl
