// Registered files that were changed, cut or taken away.
#include "coordinator/artifacts/file_check.h"

#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace ppft::coordinator {
namespace {

using ::testing::HasSubstr;

class FileCheckTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(::testing::TempDir(), "ppft_file_check_", getpid(), "_", ::testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(MakeDirs(JoinPath(dir_, "models/tiny")).ok());
    auto store = BlobStore::Open(JoinPath(dir_, "data"), 0);
    ASSERT_TRUE(store.ok()) << store.status();
    blobs_ = *std::move(store);
    const auto rows = blobs_->AddBytes("rows", "train.jsonl");
    ASSERT_TRUE(rows.ok()) << rows.status();
    dataset_.set_id("ds-1");
    dataset_.set_name("train.jsonl");
    dataset_.set_sha256(rows->sha256());
    dataset_.set_size_bytes(4);
    model_.mutable_model()->set_name("tiny");
    model_.mutable_model()->set_path(JoinPath(dir_, "models/tiny"));
    Write("headerWEIGHTS");
    v1::ModelRecord::Tensor& tensor = *model_.add_tensors();
    tensor.set_file("model.safetensors");
    tensor.set_offset(6);
    tensor.mutable_tensor()->set_name("model.norm.weight");
    tensor.mutable_tensor()->mutable_content()->set_sha256(Sha256Hex("WEIGHTS"));
    tensor.mutable_tensor()->mutable_content()->set_size_bytes(7);
    const auto config = blobs_->AddBytes("{}", "config.json");
    ASSERT_TRUE(config.ok()) << config.status();
    *model_.add_files() = *config;
  }
  void TearDown() override { ASSERT_TRUE(RemoveAll(dir_).ok()); }

  void Write(const std::string& weights) { ASSERT_TRUE(WriteFileAtomic(JoinPath(dir_, "models/tiny/model.safetensors"), weights).ok()); }

  // The problems, "owner: message" each.
  std::vector<std::string> Problems(bool contents) {
    FileCheckup checkup(*blobs_, {JoinPath(dir_, "models")}, contents);
    checkup.Add(model_);
    checkup.Add(dataset_);
    EXPECT_EQ(checkup.result().num_models(), 1);
    EXPECT_EQ(checkup.result().num_datasets(), 1);
    std::vector<std::string> out;
    for (const v1::FileProblem& problem : checkup.result().problems()) {
      EXPECT_NE(problem.remedy(), "");
      out.push_back(absl::StrCat(problem.owner(), ": ", problem.message()));
    }
    bytes_ = checkup.result().checked_bytes();
    return out;
  }

  std::string dir_;
  std::unique_ptr<BlobStore> blobs_;
  v1::ModelRecord model_;
  v1::Dataset dataset_;
  int64_t bytes_ = 0;
};

TEST_F(FileCheckTest, NothingIsWrong) {
  EXPECT_TRUE(Problems(false).empty());
  EXPECT_EQ(bytes_, 0) << "sizes alone";
  EXPECT_TRUE(Problems(true).empty());
  EXPECT_EQ(bytes_, 7 + 2 + 4);
}

TEST_F(FileCheckTest, ChangedBytesShowOnlyWhenTheyAreRead) {
  Write("headerWEIGHTz");
  EXPECT_TRUE(Problems(false).empty());
  const std::vector<std::string> problems = Problems(true);
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_THAT(problems[0], HasSubstr("model tiny: "));
  EXPECT_THAT(problems[0], HasSubstr("tensor model.norm.weight has changed"));
}

TEST_F(FileCheckTest, CutAndMissingFiles) {
  Write("headerWEI");
  EXPECT_THAT(Problems(false).at(0), HasSubstr("shorter than it was"));
  ASSERT_TRUE(RemoveAll(JoinPath(dir_, "models/tiny/model.safetensors")).ok());
  EXPECT_THAT(Problems(false).at(0), HasSubstr("model.safetensors"));
  ASSERT_TRUE(RemoveAll(JoinPath(dir_, "models/tiny")).ok());
  EXPECT_EQ(Problems(false).size(), 1u);
}

TEST_F(FileCheckTest, ContentsOfTheDataFolder) {
  ASSERT_TRUE(blobs_->Delete(dataset_.sha256()).ok());
  ASSERT_EQ(chmod(blobs_->PathOf(model_.files(0).sha256()).c_str(), 0600), 0);
  ASSERT_TRUE(WriteFileAtomic(blobs_->PathOf(model_.files(0).sha256()), "[]").ok());
  const std::vector<std::string> sizes = Problems(false);
  ASSERT_EQ(sizes.size(), 1u);
  EXPECT_THAT(sizes[0], HasSubstr("dataset ds-1: train.jsonl: its content is missing"));
  const std::vector<std::string> contents = Problems(true);
  ASSERT_EQ(contents.size(), 2u);
  EXPECT_THAT(contents[0], HasSubstr("config.json: its content has changed"));
}

}  // namespace
}  // namespace ppft::coordinator
