// BlobStore: resume, damage, a full disk, two uploaders.
#include "coordinator/artifacts/blob_store.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace ppft::coordinator {
namespace {

using ::testing::HasSubstr;

class BlobStoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(::testing::TempDir(), "ppft_blobs_", getpid(), "_", ::testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(MakeDirs(dir_).ok());
    Reopen();
  }
  void TearDown() override { ASSERT_TRUE(RemoveAll(dir_).ok()); }
  void Reopen() {
    auto store = BlobStore::Open(dir_, 0);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = std::move(*store);
  }
  absl::Status Put(const std::string& bytes, int64_t offset = 0) {
    const std::string sha = Sha256Hex(bytes);
    auto upload = store_->StartUpload(sha, sha, static_cast<int64_t>(bytes.size()), offset);
    if (!upload.ok()) return upload.status();
    const absl::Status status = (*upload)->Append(absl::string_view(bytes).substr(static_cast<size_t>((*upload)->received_bytes())));
    return status.ok() ? (*upload)->Commit() : status;
  }

  std::string dir_;
  std::unique_ptr<BlobStore> store_;
};

TEST_F(BlobStoreTest, CompleteBlobIsReadOnlyAndStaysAfterReopening) {
  const std::string bytes = "some bytes";
  const std::string sha = Sha256Hex(bytes);
  EXPECT_FALSE(store_->Find(sha));
  ASSERT_TRUE(Put(bytes).ok());
  ASSERT_TRUE(Put(bytes).ok());  // again: nothing to do
  Reopen();
  EXPECT_EQ(store_->Find(sha), std::optional<int64_t>(10));
  EXPECT_EQ(*store_->Read(sha, 100), bytes);
  struct stat info;
  ASSERT_EQ(stat(store_->PathOf(sha).c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0400u);
  EXPECT_TRUE(Put("").ok());
  EXPECT_TRUE(store_->Delete(sha).ok());
  EXPECT_TRUE(store_->Delete(sha).ok());
  EXPECT_EQ(store_->Read(sha, 100).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(BlobStoreTest, CutUploadGoesOnWhereItWasAlsoInANewProcess) {
  const std::string bytes = std::string(100000, 'x') + "end";
  const std::string sha = Sha256Hex(bytes);
  {
    auto upload = store_->StartUpload(sha, sha, static_cast<int64_t>(bytes.size()), 0);
    ASSERT_TRUE((*upload)->Append(bytes.substr(0, 50000)).ok());
    EXPECT_EQ((*upload)->Commit().code(), absl::StatusCode::kAborted);
  }
  Reopen();
  EXPECT_EQ(store_->ReceivedBytes(sha), 50000);
  EXPECT_EQ(store_->StartUpload(sha, sha, static_cast<int64_t>(bytes.size()), 50001).status().code(), absl::StatusCode::kOutOfRange);
  ASSERT_TRUE(Put(bytes, 40000).ok());  // what came after the offset is dropped
  EXPECT_EQ(*store_->Read(sha, 1 << 20), bytes);
  EXPECT_EQ(store_->ReceivedBytes(sha), 0);
}

TEST_F(BlobStoreTest, OtherBytesThanAnnouncedLeaveNothing) {
  const std::string sha = Sha256Hex("good");
  auto upload = store_->StartUpload(sha, sha, 4, 0);
  ASSERT_TRUE((*upload)->Append("evil").ok());
  EXPECT_EQ((*upload)->Commit().code(), absl::StatusCode::kDataLoss);
  upload->reset();
  EXPECT_FALSE(store_->Find(sha));
  EXPECT_EQ(store_->ReceivedBytes(sha), 0);
  ASSERT_TRUE(Put("good").ok());
}

TEST_F(BlobStoreTest, DamageOfAPartialFileIsFoundAtTheEnd) {
  const std::string bytes(1000, 'y');
  const std::string sha = Sha256Hex(bytes);
  {
    auto upload = store_->StartUpload(sha, sha, 1000, 0);
    ASSERT_TRUE((*upload)->Append(bytes.substr(0, 500)).ok());
  }
  ASSERT_TRUE(WriteFileAtomic(JoinPath(dir_, "partial/" + sha), std::string(500, '\0')).ok());  // as a power cut may leave it
  EXPECT_EQ(Put(bytes, 500).code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(Put(bytes).ok());
}

TEST_F(BlobStoreTest, DamagedBlobIsNotRead) {
  ASSERT_TRUE(Put("fine").ok());
  const std::string path = store_->PathOf(Sha256Hex("fine"));
  ASSERT_EQ(chmod(path.c_str(), 0600), 0);
  ASSERT_TRUE(WriteFileAtomic(path, "fixe").ok());
  EXPECT_EQ(store_->Read(Sha256Hex("fine"), 100).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(BlobStoreTest, WhatIsFoundDamagedMakesRoomForTheRightBytes) {
  const std::string bytes(3 << 20, 'x');
  const std::string sha = Sha256Hex(bytes);
  ASSERT_TRUE(Put(bytes).ok());
  EXPECT_TRUE(store_->Verify(sha).ok());
  ASSERT_EQ(chmod(store_->PathOf(sha).c_str(), 0600), 0);
  std::string damaged = bytes;
  damaged[2 << 20] = 'y';
  ASSERT_TRUE(WriteFileAtomic(store_->PathOf(sha), damaged).ok());
  const absl::Status found = store_->Verify(sha);
  EXPECT_EQ(found.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(found.message()), HasSubstr(Sha256Hex(damaged)));
  EXPECT_EQ(*ReadFile(absl::StrCat(dir_, "/damaged/", sha)), damaged);
  EXPECT_EQ(store_->Verify(sha).code(), absl::StatusCode::kDataLoss) << "the next one learns why it is not there";
  EXPECT_EQ(store_->Verify(Sha256Hex("nothing")).code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(Put(bytes).ok());
  EXPECT_TRUE(store_->Verify(sha).ok());
  store_->DropOldPartials();
  EXPECT_TRUE(PathExists(absl::StrCat(dir_, "/damaged/", sha))) << "it may still be looked at";
  timespec long_ago[2] = {{1000, 0}, {1000, 0}};
  ASSERT_EQ(utimensat(AT_FDCWD, absl::StrCat(dir_, "/damaged/", sha).c_str(), long_ago, 0), 0);
  store_->DropOldPartials();
  EXPECT_FALSE(PathExists(absl::StrCat(dir_, "/damaged/", sha)));
}

TEST_F(BlobStoreTest, RefusesNonsense) {
  const std::string sha = Sha256Hex("x");
  EXPECT_EQ(store_->StartUpload("../x", sha, 1, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(store_->StartUpload(sha, "abc", 1, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(store_->StartUpload(sha, sha, -1, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(store_->StartUpload(sha, sha, int64_t{1} << 41, 0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(store_->StartUpload(sha, sha, 1, -1).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_FALSE(store_->Find("../../etc/passwd"));
  auto upload = store_->StartUpload(sha, sha, 1, 0);
  EXPECT_EQ((*upload)->Append("xx").code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(Put("known").ok());
  EXPECT_EQ(store_->StartUpload("k", Sha256Hex("known"), 4, 0).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(BlobStoreTest, TwoUploadersOfOneContentDoNotMix) {
  const std::string sha = Sha256Hex("both");
  auto first = store_->StartUpload(sha, sha, 4, 0);
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(store_->StartUpload(sha, sha, 4, 0).status().code(), absl::StatusCode::kAborted);
  // Under another key they may run side by side; the second to finish finds the blob there.
  auto second = store_->StartUpload("job.2.0." + sha, sha, 4, 0);
  ASSERT_TRUE(second.ok());
  ASSERT_TRUE((*first)->Append("both").ok() && (*second)->Append("both").ok());
  EXPECT_TRUE((*first)->Commit().ok());
  EXPECT_TRUE((*second)->Commit().ok());
  EXPECT_EQ(*store_->Read(sha, 10), "both");
}

TEST_F(BlobStoreTest, DiskFullKeepsWhatCameAndGoesOn) {
  const std::string bytes(300000, 'z');
  const std::string sha = Sha256Hex(bytes);
  rlimit old_limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const rlimit small{100000, old_limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status status = Put(bytes);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("disk is full"));
  EXPECT_THAT(std::string(status.message()), HasSubstr(dir_));
  EXPECT_EQ(store_->ReceivedBytes(sha), 100000);
  EXPECT_TRUE(Put(bytes, 100000).ok());
}

TEST_F(BlobStoreTest, UploadThatCannotFitIsRefusedBeforeItBegins) {
  struct statvfs disk;
  ASSERT_EQ(statvfs(dir_.c_str(), &disk), 0);
  auto store = BlobStore::Open(dir_, int64_t{1} << 60);
  ASSERT_TRUE(store.ok());
  EXPECT_EQ((*store)->reserve_bytes(), static_cast<int64_t>(disk.f_blocks / 16 * disk.f_frsize)) << "a reserve beyond the disk leaves most of it usable";
  // All that is free never fits beside a reserve; only where the disk has more free than a blob may hold does the largest blob fit.
  const int64_t all = std::min((*store)->FreeBytes(), kMaxBlobBytes);
  const bool fits = all <= (*store)->FreeBytes() - (*store)->reserve_bytes();
  const std::string sha = Sha256Hex("x");
  EXPECT_EQ((*store)->StartUpload(sha, sha, all, 0).status().code(), fits ? absl::StatusCode::kOk : absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(store_->StartUpload(sha, sha, 1, 0).ok()) << "nothing is left over from the upload that was refused";
}

TEST_F(BlobStoreTest, OwnFiles) {
  const auto file = store_->AddBytes("text", "name.txt");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->name(), "name.txt");
  EXPECT_EQ(file->size_bytes(), 4);
  EXPECT_EQ(store_->AddBytes("text", "again.txt")->sha256(), file->sha256());
  EXPECT_TRUE(ListDir(JoinPath(dir_, "tmp"))->empty());
}

}  // namespace
}  // namespace ppft::coordinator
