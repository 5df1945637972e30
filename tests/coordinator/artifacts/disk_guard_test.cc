// DiskGuard on a small file system of its own.
#include "coordinator/artifacts/disk_guard.h"

#include <sys/mount.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "gtest/gtest.h"

namespace ppft::coordinator {
namespace {

constexpr int64_t kMiB = 1 << 20;

class DiskGuardTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(::testing::TempDir(), "ppft_disk_", getpid());
    ASSERT_TRUE(MakeDirs(dir_).ok());
    mounted_ = mount("tmpfs", dir_.c_str(), "tmpfs", 0, "size=16m") == 0;
    if (!mounted_) GTEST_SKIP() << "a small file system cannot be mounted here: " << std::strerror(errno);
  }
  void TearDown() override {
    EXPECT_TRUE(!mounted_ || umount(dir_.c_str()) == 0);
    ASSERT_TRUE(RemoveAll(dir_).ok());
  }
  void Fill(int64_t bytes) { ASSERT_TRUE(WriteFileAtomic(JoinPath(dir_, "filler"), std::string(static_cast<size_t>(bytes), 'x')).ok()); }
  void Free() { ASSERT_EQ(unlink(JoinPath(dir_, "filler").c_str()), 0); }
  bool Ballast() { return PathExists(JoinPath(dir_, "ballast")); }

  std::string dir_;
  bool mounted_ = false;
};

// Reserve 8 MiB: full below 4, critical below 1, on again at 8; the ballast has 2.
TEST_F(DiskGuardTest, GivesTheBallastUpWhenTheDiskIsFullAndTakesItAgain) {
  DiskGuard guard(dir_, 8 * kMiB);
  EXPECT_FALSE(guard.Look().full);
  EXPECT_TRUE(Ballast());
  Fill(11 * kMiB);
  const DiskRoom full = guard.Look();
  EXPECT_TRUE(full.full);
  EXPECT_FALSE(full.critical);
  EXPECT_TRUE(Ballast());
  Free();
  Fill(14 * kMiB - 1000);  // what the ballast left
  EXPECT_TRUE(guard.Look().critical);
  EXPECT_FALSE(Ballast()) << "its room is the store's now";
  EXPECT_TRUE(guard.Look().critical) << "until there is room again";
  Free();
  EXPECT_FALSE(guard.Look().full);
  EXPECT_TRUE(Ballast());
}

TEST_F(DiskGuardTest, AStoreThatCouldNotWriteGetsTheBallast) {
  DiskGuard guard(dir_, 8 * kMiB);
  guard.Look();
  guard.GiveUpBallast();
  EXPECT_FALSE(Ballast());
  EXPECT_FALSE(guard.Look().full) << "there is room";
  EXPECT_TRUE(Ballast());
  EXPECT_TRUE(DiskGuard::RemoveBallast(dir_));
  EXPECT_FALSE(DiskGuard::RemoveBallast(dir_));
}

}  // namespace
}  // namespace ppft::coordinator
