#include "common/base/files.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/base/sha256.h"
#include "common/base/status.h"

namespace ppft {
namespace {

class FilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::temp_directory_path() / absl::StrCat("ppft-files-test-", getpid());
    std::filesystem::remove_all(root_);
    ASSERT_TRUE(MakeDirs(root_ + "/a/b").ok());
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  std::string root_;
};

TEST_F(FilesTest, AtomicWriteReplacesWholeAndLeavesNoTemporary) {
  const std::string path = root_ + "/f";
  ASSERT_TRUE(WriteFileAtomic(path, "one").ok());
  ASSERT_TRUE(WriteFileAtomic(path, "two").ok());
  EXPECT_EQ(*ReadFile(path), "two");
  EXPECT_EQ(ListDir(root_)->size(), 2u);  // a, f
  EXPECT_FALSE(WriteFileAtomic(root_ + "/missing/f", "x").ok());
}

TEST_F(FilesTest, RangesAreExact) {
  const std::string path = root_ + "/f";
  ASSERT_TRUE(WriteFileAtomic(path, "0123456789").ok());
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  char bytes[4];
  ASSERT_TRUE(ReadAt(fd.get(), bytes, 4, 3, path).ok());
  EXPECT_EQ(std::string(bytes, 4), "3456");
  EXPECT_EQ(ReadAt(fd.get(), bytes, 4, 8, "tensor q").ToString(), "DATA_LOSS: tensor q: the file ends at byte 10, 2 bytes too early");
  EXPECT_EQ(*FileSize(path), 10);
  EXPECT_EQ(ReadFile(path, 9).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReadFile(root_ + "/none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadFile(root_).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(FilesTest, AMappingOutlivesItsName) {
  const std::string path = root_ + "/f";
  ASSERT_TRUE(WriteFileAtomic(path, "mapped").ok());
  auto mapped = MappedFile::Open(path);
  ASSERT_TRUE(mapped.ok());
  ASSERT_EQ(unlink(path.c_str()), 0);
  EXPECT_EQ(mapped->bytes(), "mapped");
  ASSERT_TRUE(WriteFileAtomic(path, "").ok());
  EXPECT_EQ(MappedFile::Open(path)->bytes(), "");
}

TEST_F(FilesTest, MakeDirsRefusesAFileInTheWay) {
  ASSERT_TRUE(WriteFileAtomic(root_ + "/f", "x").ok());
  EXPECT_FALSE(MakeDirs(root_ + "/f").ok());
  EXPECT_FALSE(MakeDirs(root_ + "/f/g").ok());
  EXPECT_TRUE(MakeDirs(root_ + "/a/b/c/d").ok());
}

TEST(Sha256Test, KnownVectors) {
  EXPECT_EQ(Sha256Hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  Sha256 parts;
  parts.Update("a");
  parts.Update("bc");
  EXPECT_EQ(parts.HexDigest(), Sha256Hex("abc"));
  EXPECT_TRUE(IsSha256Hex(Sha256Hex("")));
  EXPECT_FALSE(IsSha256Hex("BA7816"));
}

TEST(StatusTest, AnnotateKeepsCodeAndErrnoNamesTheCause) {
  EXPECT_TRUE(Annotate(absl::OkStatus(), "x").ok());
  EXPECT_EQ(Annotate(absl::NotFoundError("gone"), "file").message(), "file: gone");
  EXPECT_EQ(ErrnoStatus(ENOSPC, "f").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrnoStatus(ENOENT, "f").message(), "f: No such file or directory");
}

}  // namespace
}  // namespace ppft
