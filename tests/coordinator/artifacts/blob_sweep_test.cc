// BlobSweep: what goes, and what must stay, on real files and a real store.
#include "coordinator/artifacts/blob_sweep.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/artifacts/inline_controller.h"

namespace ppft::coordinator {
namespace {

class BlobSweepTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(::testing::TempDir(), "ppft_sweep_", getpid(), "_", ::testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(MakeDirs(dir_).ok());
    auto store = OpenSqliteJobStore(dir_);
    ASSERT_TRUE(store.ok()) << store.status();
    controller_ = std::make_unique<InlineController>(std::move(*store));
    Open();
  }
  void TearDown() override { ASSERT_TRUE(RemoveAll(dir_).ok()); }
  void Open() {
    auto blobs = BlobStore::Open(dir_, 0);
    ASSERT_TRUE(blobs.ok()) << blobs.status();
    blobs_ = std::move(*blobs);
  }
  // A blob that was last touched an hour ago.
  std::string Old(const std::string& bytes) {
    const auto file = blobs_->AddBytes(bytes, "file");
    EXPECT_TRUE(file.ok()) << file.status();
    const timespec hour_ago{absl::ToUnixSeconds(absl::Now()) - 3600, 0};
    const timespec times[2] = {hour_ago, hour_ago};
    EXPECT_EQ(utimensat(AT_FDCWD, blobs_->PathOf(file->sha256()).c_str(), times, 0), 0);
    return file->sha256();
  }
  void Name(const std::string& sha256, absl::Time when = absl::Now()) {
    const absl::Status status = controller_->Run([=](JobStore& store) { return store.PutBlob({sha256, 1, when}); });
    ASSERT_TRUE(status.ok()) << status;
  }
  int Sweep() {
    const auto removed = SweepBlobs(*blobs_, *controller_, absl::Now() - absl::Minutes(1), absl::Now() - absl::Hours(24));
    EXPECT_TRUE(removed.ok()) << removed.status();
    return removed.ok() ? *removed : -1;
  }
  bool Has(const std::string& sha256) { return blobs_->Find(sha256).has_value(); }

  std::string dir_;
  std::unique_ptr<InlineController> controller_;
  std::unique_ptr<BlobStore> blobs_;
};

TEST_F(BlobSweepTest, AFileThatNoRowNamesGoesAndOthersStay) {
  const std::string unnamed = Old("crashed before its row"), named = Old("uploaded"), dataset = Old("dataset");
  const std::string young = blobs_->AddBytes("its row comes in a moment", "file")->sha256();
  Name(named);
  v1::Dataset row;
  row.set_id("ds-1");
  row.set_sha256(dataset);  // a reference without a row of its own, as a job's token files have
  ASSERT_TRUE(controller_->Run([&](JobStore& store) { return store.PutDataset(row); }).ok());
  EXPECT_EQ(Sweep(), 1);
  EXPECT_FALSE(Has(unnamed));
  EXPECT_TRUE(Has(named));
  EXPECT_TRUE(Has(dataset));
  EXPECT_TRUE(Has(young));
  EXPECT_EQ(Sweep(), 0);
}

TEST_F(BlobSweepTest, AnOldBlobThatIsFoundAgainIsYoung) {
  const std::string by_upload = Old("again by an upload"), by_us = Old("again by us"), by_name = Old("about to be named");
  const std::string bytes = "again by an upload";
  EXPECT_TRUE((*blobs_->StartUpload(by_upload, by_upload, static_cast<int64_t>(bytes.size()), 0))->complete());
  ASSERT_TRUE(blobs_->AddBytes("again by us", "file").ok());
  EXPECT_TRUE(blobs_->Touch(by_name));
  EXPECT_FALSE(blobs_->Touch(Sha256Hex("never seen")));
  EXPECT_EQ(Sweep(), 0);
  for (const std::string& sha256 : {by_upload, by_us, by_name}) EXPECT_TRUE(Has(sha256));
}

TEST_F(BlobSweepTest, AnUploadThatNothingEverUsedGoesInTwoSteps) {
  const std::string unused = Old("never became a dataset"), used = Old("became one"), fresh = Old("uploaded an hour ago");
  for (const std::string& sha256 : {unused, used}) Name(sha256, absl::Now() - absl::Hours(25));
  Name(fresh, absl::Now() - absl::Hours(1));
  v1::Dataset row;
  row.set_id("ds-1");
  row.set_sha256(used);
  ASSERT_TRUE(controller_->Run([&](JobStore& store) { return store.PutDataset(row); }).ok());
  EXPECT_EQ(Sweep(), 1);
  EXPECT_FALSE(Has(unused));
  EXPECT_TRUE(Has(used));
  EXPECT_TRUE(Has(fresh));
}

TEST_F(BlobSweepTest, TheFirstSweepTakesWhatWasThereBeforeTheStartAlone) {
  const std::string before = Old("of the last run");
  Open();
  const std::string after = blobs_->AddBytes("of this run", "file")->sha256();
  {
    SweepLimits limits;
    BlobSweep sweep(blobs_.get(), controller_.get(), limits);
    for (int i = 0; i < 3000 && Has(before); ++i) absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_FALSE(Has(before));
  EXPECT_TRUE(Has(after));
}

}  // namespace
}  // namespace ppft::coordinator
