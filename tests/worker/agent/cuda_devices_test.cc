// The trainer that is asked about devices is a shell script here.
#include "worker/agent/cuda_devices.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "absl/strings/match.h"
#include "common/base/files.h"

namespace ppft::agent {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kTwoDevices[] = R"({"devices":[{"index":0,"name":"NVIDIA H200","uuid":"GPU-a","memory_bytes":1000,"compute_capability":"9.0","driver":"580.1"},)"
                               R"({"index":1,"name":"NVIDIA H200","uuid":"GPU-b","memory_bytes":2000,"compute_capability":"9.0","driver":"580.1"}]})";

class CudaDevicesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = ::testing::TempDir() + "ppft-cuda-devices-XXXXXX";
    ASSERT_NE(mkdtemp(folder_.data()), nullptr) << folder_;
    unsetenv("PPFT_TORCH_ROOT");
  }
  void TearDown() override { ASSERT_TRUE(RemoveAll(folder_).ok()); }

  // `probe` is what it does for --probe-devices.
  std::string Trainer(const std::string& probe) {
    const std::string path = JoinPath(folder_, "trainer");
    EXPECT_TRUE(WriteFileAtomic(path, "#!/bin/sh\nif [ \"$1\" = --version ]; then echo LibTorch; exit 0; fi\n" + probe + "\n").ok());
    EXPECT_EQ(chmod(path.c_str(), 0755), 0);
    return path;
  }

  std::string folder_;
};

TEST_F(CudaDevicesTest, AllOrSomeOfWhatTheTrainerSees) {
  const std::string trainer = Trainer(std::string("echo noise; echo '") + kTwoDevices + "'");
  const auto all = OfferCudaDevices("all", trainer);
  ASSERT_TRUE(all.ok()) << all.status();
  ASSERT_EQ(all->devices.size(), 2u);
  EXPECT_EQ(all->devices[1].id(), "cuda:1");
  EXPECT_EQ(all->devices[1].kind(), "cuda");
  EXPECT_EQ(all->devices[1].name(), "NVIDIA H200");
  EXPECT_EQ(all->devices[1].memory_bytes(), 2000);
  EXPECT_EQ(all->devices[1].compute_capability(), "9.0");
  EXPECT_EQ(all->devices[1].driver(), "580.1");
  EXPECT_THAT(all->environment, IsEmpty());
  const auto one = OfferCudaDevices("1", trainer);
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_EQ(one->devices.size(), 1u);
  EXPECT_EQ(one->devices[0].id(), "cuda:1");
}

TEST_F(CudaDevicesTest, AnOlderGpuIsLeftOut) {
  const std::string old = R"({"index":0,"name":"Tesla T4","memory_bytes":1000,"compute_capability":"7.5"})";
  const std::string newer = R"({"index":1,"name":"NVIDIA A100","memory_bytes":2000,"compute_capability":"8.0"})";
  const std::string both = Trainer("echo '{\"devices\":[" + old + "," + newer + "]}'");
  const auto all = OfferCudaDevices("all", both);
  ASSERT_TRUE(all.ok()) << all.status();
  ASSERT_EQ(all->devices.size(), 1u);
  EXPECT_EQ(all->devices[0].id(), "cuda:1");
  const auto named = OfferCudaDevices("0,1", both);
  EXPECT_EQ(named.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(named.status().message()),
              HasSubstr("--devices cuda:0,1: device 0 (Tesla T4) has compute capability 7.5: trainers need 8.0 or later"));
  const auto none = OfferCudaDevices("all", Trainer("echo '{\"devices\":[" + old + "]}'"));
  EXPECT_EQ(none.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("--devices cuda:all: device 0 (Tesla T4)"));
}

TEST_F(CudaDevicesTest, WhatCannotBeOfferedIsOneSentence) {
  const struct {
    const char* which;
    std::string probe;
    absl::StatusCode code;
    const char* says;
  } cases[] = {
      {"all", R"(echo '{"devices":[],"error":"no NVIDIA driver on this machine"}')", absl::StatusCode::kFailedPrecondition, "no NVIDIA driver on this machine"},
      {"0,2", std::string("echo '") + kTwoDevices + "'", absl::StatusCode::kInvalidArgument, "there is no device 2, only 2 of them"},
      {"0,0", "", absl::StatusCode::kInvalidArgument, "cuda:all or different indices"},
      {"some", "", absl::StatusCode::kInvalidArgument, "cuda:all or different indices"},
      {"all", "echo 'symbol lookup error: undefined symbol' >&2; exit 127", absl::StatusCode::kFailedPrecondition, "undefined symbol"},
      {"all", "kill -SEGV $$", absl::StatusCode::kFailedPrecondition, "status 139"},
  };
  for (const auto& c : cases) {
    const auto offer = OfferCudaDevices(c.which, Trainer(c.probe));
    EXPECT_EQ(offer.status().code(), c.code) << offer.status();
    EXPECT_THAT(std::string(offer.status().message()), HasSubstr(c.says));
    EXPECT_THAT(std::string(offer.status().message()), HasSubstr("--devices"));
  }
}

TEST_F(CudaDevicesTest, AMissingDriverIsNamedBesideWhatElseIsMissing) {
  const auto offer = OfferCudaDevices("all", Trainer(R"(echo '{"devices":[],"error":"the CUDA part cannot be loaded"}')"));
  const bool there = PathExists("/proc/driver/nvidia/version") || PathExists("/dev/dxg");
  EXPECT_EQ(absl::StrContains(offer.status().message(), "no NVIDIA driver"), !there) << offer.status();
  const auto told = OfferCudaDevices("all", Trainer(R"(echo '{"devices":[],"error":"the driver is too old"}')"));
  EXPECT_EQ(told.status().message(), "--devices cuda:all: the driver is too old");
}

TEST_F(CudaDevicesTest, ATorchRootWithoutLibTorchIsNamed) {
  setenv("PPFT_TORCH_ROOT", folder_.c_str(), 1);
  const auto found = FindTorch(Trainer(""));
  unsetenv("PPFT_TORCH_ROOT");
  EXPECT_EQ(found.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(found.status().message()), HasSubstr(folder_));
}

TEST_F(CudaDevicesTest, TheFoldersOfTorchComeBeforeThoseOfTheUser) {
  setenv("LD_LIBRARY_PATH", "/mine", 1);
  const std::vector<std::string> environment = TorchEnvironment("/site/torch");
  unsetenv("LD_LIBRARY_PATH");
  ASSERT_EQ(environment.size(), 1u);
  EXPECT_THAT(environment[0], ::testing::StartsWith("LD_LIBRARY_PATH=/site/torch/lib:/site/torch/../nvidia/nccl/lib:"));
  EXPECT_THAT(environment[0], ::testing::EndsWith(":/mine"));
}

TEST(VisibleDeviceTest, IndicesCountAmongTheDevicesThatTheWorkerSees) {
  EXPECT_EQ(VisibleDevice("cuda:1", ""), "CUDA_VISIBLE_DEVICES=1");
  EXPECT_EQ(VisibleDevice("cuda:1", "4,6"), "CUDA_VISIBLE_DEVICES=6");
  EXPECT_EQ(VisibleDevice("cuda:0", "GPU-abc"), "CUDA_VISIBLE_DEVICES=GPU-abc");
}

TEST(RunProgramTest, OutputErrorAndStatusComeBackAndTheDeadlineEndsIt) {
  const auto ran = RunProgram({"/bin/sh", "-c", "echo $GREETING; echo bad >&2; exit 7"}, {"GREETING=hello"}, absl::Seconds(60));
  ASSERT_TRUE(ran.ok()) << ran.status();
  EXPECT_EQ(ran->out, "hello\n");
  EXPECT_EQ(ran->error, "bad\n");
  EXPECT_EQ(ran->status, 7);
  EXPECT_EQ(RunProgram({"/bin/sleep", "600"}, {}, absl::Milliseconds(50)).status().code(), absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace ppft::agent
