// What a host can give of what its worker was started for. The trainer that is asked is a shell script here.
#include "worker/agent/offer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "worker/agent/devices.h"

namespace ppft::agent {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class OfferTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = ::testing::TempDir() + "ppft-offer-XXXXXX";
    ASSERT_NE(mkdtemp(folder_.data()), nullptr) << folder_;
    unsetenv("PPFT_TORCH_ROOT");
  }
  void TearDown() override { ASSERT_TRUE(RemoveAll(folder_).ok()); }

  std::string Trainer(const std::string& probe) {
    const std::string path = JoinPath(folder_, "trainer");
    EXPECT_TRUE(
        WriteFileAtomic(path, absl::StrCat("#!/bin/sh\nif [ \"$1\" = --version ]; then echo LibTorch 2.11.0 at /here; exit 0; fi\n", probe, "\n")).ok());
    EXPECT_EQ(chmod(path.c_str(), 0755), 0);
    return path;
  }

  std::string folder_;
};

TEST_F(OfferTest, SlotsComeWithTheirLibTorch) {
  const auto offer = OfferHost("cpu:2", 1, Trainer(""));
  ASSERT_TRUE(offer.ok()) << offer.status();
  EXPECT_EQ(offer->devices.size(), 2u);
  EXPECT_EQ(offer->torch, "LibTorch 2.11.0 at /here");
  EXPECT_THAT(offer->problems, IsEmpty());
}

TEST_F(OfferTest, OneWorkerOffersOneKind) {
  for (const char* both : {"cpu:2,cuda:0", "cuda:0,cpu:2"}) {
    const auto offer = OfferHost(both, 1, Trainer(""));
    EXPECT_EQ(offer.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(offer.status().message()), HasSubstr("start one worker for each"));
  }
}

TEST_F(OfferTest, WhatTheHostLacksIsAProblemAndNotAnEnd) {
  const auto no_driver = OfferHost("cuda:all", 0, Trainer(R"(echo '{"devices":[],"error":"no NVIDIA driver on this machine"}')"));
  ASSERT_TRUE(no_driver.ok()) << no_driver.status();
  EXPECT_THAT(no_driver->devices, IsEmpty());
  EXPECT_THAT(no_driver->problems, ElementsAre("--devices cuda:all: no NVIDIA driver on this machine"));

  setenv("PPFT_TORCH_ROOT", folder_.c_str(), 1);
  const auto no_torch = OfferHost("cpu:1", 1, Trainer(""));
  unsetenv("PPFT_TORCH_ROOT");
  ASSERT_TRUE(no_torch.ok()) << no_torch.status();
  EXPECT_THAT(no_torch->devices, IsEmpty());
  EXPECT_THAT(no_torch->problems, ElementsAre(HasSubstr("holds no lib/libtorch_cpu.so")));
}

TEST_F(OfferTest, ADeviceWithTooLittleMemoryIsNamed) {
  const auto offer = OfferHost("cuda:all", 0,
                               Trainer(R"(echo '{"torch":"LibTorch","nccl":"2.28.9","devices":[)"
                                       R"({"index":0,"name":"small","memory_bytes":1073741824,"compute_capability":"9.0"},)"
                                       R"({"index":1,"name":"large","memory_bytes":17179869184,"compute_capability":"9.0"}]}')"));
  ASSERT_TRUE(offer.ok()) << offer.status();
  EXPECT_EQ(offer->devices.size(), 2u);
  EXPECT_EQ(offer->nccl, "2.28.9");
  EXPECT_THAT(offer->problems, ElementsAre(HasSubstr("cuda:0 has 1024 MiB of memory, a trainer needs at least 2048")));
}

TEST_F(OfferTest, FlagsThatMakeNoSenseAreRefused) {
  for (const char* flag : {"cpu", "cpu:0", "cuda:x", "tpu:1"}) EXPECT_TRUE(absl::IsInvalidArgument(OfferHost(flag, 0, Trainer("")).status())) << flag;
}

TEST(MetricsAddressTest, WhatIsBoundToEveryAddressIsReachedWhereTheTrainersAre) {
  EXPECT_EQ(MetricsAddress("127.0.0.1:9100", "10.0.0.5"), "127.0.0.1:9100");
  EXPECT_EQ(MetricsAddress("[fd00::1]:9100", "fd00::2"), "[fd00::1]:9100");
  EXPECT_EQ(MetricsAddress("0.0.0.0:9100", "10.0.0.5"), "10.0.0.5:9100");
  EXPECT_EQ(MetricsAddress("[::]:9100", "10.0.0.5"), "10.0.0.5:9100");
  EXPECT_EQ(MetricsAddress("[0::0]:9100", "gpu-1"), "gpu-1:9100");
  EXPECT_EQ(MetricsAddress("[::]:9100", "fd00::2"), "[fd00::2]:9100");
}

}  // namespace
}  // namespace ppft::agent
