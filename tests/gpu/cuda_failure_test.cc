// What a device does when it breaks or is full: each has a name, an owner and a remedy. A broken device stays broken for its process, so such a test runs in
// a process of its own.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>

#include "tests/gpu/gpu.h"
#include "tests/gpu/model.h"
#include "worker/trainer/engine/failure.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

class CudaFailureTest : public testing::Test {
 protected:
  // The other tests of this process want the device's memory.
  void TearDown() override { Gpu().ReleaseCachedMemory(); }
};

TEST_F(CudaFailureTest, AFullDeviceIsNamedAndGoesOn) {
  const int64_t all = Gpu().Memory(0).device_bytes;
  const absl::Status status = CatchTorch("stage 0", [&]() -> absl::Status {
    const at::Tensor too_much = at::empty({2 * all}, OnGpu(at::kByte));
    return absl::OkStatus();
  });
  const FailureReport report = DescribeFailure(status, 7);
  EXPECT_EQ(report.code, "OUT_OF_DEVICE_MEMORY") << status;
  EXPECT_EQ(report.step, 7);
  EXPECT_FALSE(report.remedy.empty());
  // The same process may use what is left.
  EXPECT_EQ(at::full({4}, 2.0, OnGpu(at::kFloat)).sum().item<float>(), 8.0f);
}

TEST_F(CudaFailureTest, AModelThatDoesNotFitIsNamed) {
  Gpu().ReleaseCachedMemory();
  const int64_t free = Gpu().Memory(0).device_free_bytes;
  // All but 512 MiB; what a product's library wants beside LibTorch still finds room.
  const at::Tensor taken = at::empty({free - (512 << 20)}, OnGpu(at::kByte));
  const model::ModelConfig config = ConfigOf(2048, 8192, 4, 32, 8, 64, 32000, /*tied=*/true);
  StageOptions options;
  options.num_layers = 4;
  options.has_embedding = options.has_head = true;
  options.compute = at::kBFloat16;
  options.device = at::Device(at::kCUDA, 0);
  options.kernels = &Gpu().KernelsOf(0);
  options.lora = {16, 2.0, 0.0, 11, AllTargets()};
  const auto stage = StageModel::Create(config, options, RandomSource(config, at::kFloat));
  EXPECT_EQ(DescribeFailure(stage.status(), 0).code, "OUT_OF_DEVICE_MEMORY") << stage.status();
}

// A target outside of the vocabulary trips the kernel's assertion: from then on every call fails.
[[noreturn]] void BreakTheDevice() {
  const absl::Status status = CatchTorch("B3(1)", [&]() -> absl::Status {
    const at::Tensor logits = at::zeros({4, 64}, OnGpu(at::kFloat)), sum = at::zeros({1}, OnGpu(at::kDouble));
    Gpu().KernelsOf(0).CrossEntropy(logits, at::full({4}, 64, OnGpu(at::kLong)), 1.0, true, sum);
    sum.item<double>();
    return absl::OkStatus();
  });
  const absl::Status later = CatchTorch("optimizer", [&]() -> absl::Status {
    Gpu().Synchronize(0);
    return absl::OkStatus();
  });
  const FailureReport report = DescribeFailure(BlameGpu(status, "cuda:0, GPU-0"), 3);
  std::fprintf(stderr, "%s of %s: %s; %s; later: %s\n", report.code.c_str(), report.owner.c_str(), report.message.c_str(), report.remedy.c_str(),
               std::string(later.message()).c_str());
  std::fflush(stderr);
  _exit(!status.ok() && !later.ok() ? 0 : 1);
}

TEST(CudaFailureDeathTest, ABrokenDeviceIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a new process: CUDA does not survive a fork
  EXPECT_EXIT(BreakTheDevice(), testing::ExitedWithCode(0), "DEVICE_ERROR of INFRASTRUCTURE: cuda:0, GPU-0: .*assert.*NVRM: Xid");
}

}  // namespace
}  // namespace ppft::trainer
