// Files that workers put and fetch.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <filesystem>
#include <string>

#include "common/base/files.h"
#include "common/net/status.h"
#include "tests/coordinator/artifacts/services_test.h"

namespace ppft::coordinator {
namespace {

using ::testing::HasSubstr;

TEST_F(ServicesTest, AWorkersFileThatHasNoRoomPausesItsJobAndLeavesNothing) {
  controller_->SetEpoch("job-1", 3);
  const std::string bytes(300000, 'c');
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{200000, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const grpc::Status status = Put(3, bytes, Sha256Hex(bytes));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(controller_->disk_full(), HasSubstr("job-1 needs"));
  EXPECT_THAT(controller_->disk_full(), HasSubstr("a file of 300000 bytes"));
  EXPECT_TRUE(ListDir(JoinPath(dir_, "data/partial"))->empty());
  EXPECT_TRUE(Put(3, bytes, Sha256Hex(bytes)).ok());
}

TEST_F(ServicesTest, WorkersPutFilesOfTheCurrentEpochOnly) {
  controller_->SetEpoch("job-1", 3);
  const std::string bytes = "checkpoint bytes";
  const std::string sha = Sha256Hex(bytes);
  EXPECT_EQ(Put(2, bytes, sha).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  std::string back;
  EXPECT_EQ(Fetch(sha, 0, &back).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Put(3, "checkpoint bytez", sha).error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_EQ(Fetch(sha, 0, &back).error_code(), grpc::StatusCode::NOT_FOUND);
  ASSERT_TRUE(Put(3, bytes, sha).ok());
  ASSERT_TRUE(Put(3, bytes, sha).ok());
  ASSERT_TRUE(Fetch(sha, 0, &back).ok());
  EXPECT_EQ(back, bytes);
}

TEST_F(ServicesTest, WorkersAreToldWhetherAFileIsLostOrItsDiskIsNotThere) {
  const std::string sha = Sha256Hex("a checkpoint");
  const auto reason = [&] {
    std::string back;
    const absl::Status status = net::StatusFromGrpc(Fetch(sha, 0, &back));
    EXPECT_FALSE(absl::IsUnavailable(status)) << "workers would wait for it";
    return net::GetErrorInfo(status).reason;
  };
  EXPECT_EQ(reason(), "CONTENT_MISSING");
  EXPECT_TRUE(absl::IsNotFound(artifacts_->work()->CheckBlobs({sha})));
  std::filesystem::rename(dir_ + "/data/blobs", dir_ + "/unmounted");
  EXPECT_EQ(reason(), "STORE_UNREADABLE");
  EXPECT_TRUE(absl::IsUnavailable(artifacts_->work()->CheckBlobs({sha})));
  std::filesystem::rename(dir_ + "/unmounted", dir_ + "/data/blobs");
  ASSERT_TRUE(Upload("a checkpoint").ok());
  EXPECT_TRUE(artifacts_->work()->CheckBlobs({sha}).ok());
  EXPECT_EQ(reason(), "");
}

}  // namespace
}  // namespace ppft::coordinator
