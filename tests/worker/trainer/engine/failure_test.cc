#include "worker/trainer/engine/failure.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "worker/trainer/comm/transport.h"

namespace ppft::trainer {
namespace {

using ::testing::HasSubstr;

TEST(IsOutOfDeviceMemory, AFullDiskIsNone) {
  const absl::Status full = absl::ResourceExhaustedError("adapter-rank-0.safetensors: No space left on device");
  EXPECT_TRUE(IsOutOfDeviceMemory(full));
  EXPECT_FALSE(IsOutOfDeviceMemory(WithReason(full, "DISK_FULL", "OPERATOR", "free space")));
  EXPECT_TRUE(IsOutOfDeviceMemory(absl::InternalError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")));
  EXPECT_FALSE(IsOutOfDeviceMemory(absl::InternalError("an illegal memory access was encountered")));
  EXPECT_FALSE(IsOutOfDeviceMemory(absl::OkStatus()));
}

TEST(BlameGpu, NamesTheGpuAndWhereItsDriverTellsMore) {
  const FailureReport report = DescribeFailure(BlameGpu(absl::InternalError("CUDA error: unspecified launch failure"), "cuda:1, GPU-4f2a"), 12);
  EXPECT_EQ(report.code, "DEVICE_ERROR");
  EXPECT_EQ(report.owner, "INFRASTRUCTURE");
  EXPECT_THAT(report.message, HasSubstr("cuda:1, GPU-4f2a: CUDA error"));
  for (const char* part : {"NVRM: Xid", "GPU-4f2a", "dmesg", "journalctl -k"}) EXPECT_THAT(report.remedy, HasSubstr(part));
}

TEST(BlameGpu, OtherFailuresStayAsTheyAre) {
  for (const absl::Status& status : {absl::OkStatus(), WithPeer(absl::UnavailableError("rank 1 is gone"), 1), absl::ResourceExhaustedError("out of memory"),
                                     WithReason(absl::InternalError("damaged"), "CHECKPOINT_CORRUPT", "INFRASTRUCTURE", "wait")}) {
    EXPECT_EQ(BlameGpu(status, "cuda:0, GPU-4f2a"), status);
  }
  const absl::Status on_cpu = absl::InternalError("an error without a GPU");
  EXPECT_EQ(BlameGpu(on_cpu, ""), on_cpu);
}

TEST(Checkpoint, OnlyABadFileCostsIt) {
  const auto code = [](const absl::Status& status) { return DescribeFailure(status, 0).code; };
  const absl::Status bad = absl::DataLossError("exp_avg.x holds a number that is not finite"), format = absl::InvalidArgumentError("it is truncated");
  const absl::Status missing = absl::NotFoundError("no tensor x"), many_files = absl::InternalError("Too many open files");
  const absl::Status full = absl::ResourceExhaustedError("CUDA out of memory"), device = absl::InternalError("CUDA error: an illegal address");
  for (const absl::Status& status : {bad, format}) EXPECT_EQ(code(OpenedCheckpoint(status)), "CHECKPOINT_CORRUPT") << status;
  for (const absl::Status& status : {missing, many_files}) EXPECT_EQ(code(OpenedCheckpoint(status)), "INTERNAL") << status;
  for (const absl::Status& status : {bad, format, missing}) EXPECT_EQ(code(ReadCheckpoint(status)), "CHECKPOINT_CORRUPT") << status;
  EXPECT_EQ(code(ReadCheckpoint(full)), "OUT_OF_DEVICE_MEMORY");
  EXPECT_EQ(code(ReadCheckpoint(device)), "DEVICE_ERROR");
  EXPECT_TRUE(OpenedCheckpoint(absl::OkStatus()).ok() && ReadCheckpoint(absl::OkStatus()).ok());
}

}  // namespace
}  // namespace ppft::trainer
