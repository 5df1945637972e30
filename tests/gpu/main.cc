// Loads the plugin and runs the tests on device 0. Exit status 77: there is no GPU, which one line says.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "tests/gpu/gpu.h"
#include "worker/trainer/cuda/loader.h"

namespace ppft::trainer {
namespace {

CudaRuntime* gpu = nullptr;

}  // namespace

CudaRuntime& Gpu() { return *gpu; }

}  // namespace ppft::trainer

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const char* plugin = std::getenv("PPFT_CUDA_PLUGIN");
  const auto runtime = ppft::trainer::LoadCudaPlugin(plugin != nullptr ? plugin : "");
  if (!runtime.ok()) {
    std::printf("FAILED to load: %s\n", std::string(runtime.status().message()).c_str());
    return 1;
  }
  ppft::trainer::gpu = *runtime;
  std::string reason;
  const auto devices = ppft::trainer::gpu->Devices(&reason);
  if (devices.empty()) {
    std::printf("no GPU: %s\n", reason.c_str());
    return 77;
  }
  const ppft::trainer::CudaDevice& d = devices[0];
  std::printf("device 0 of %zu: %s, %.1f GiB, compute capability %d.%d, driver %s, %s\n", devices.size(), d.name.c_str(),
              static_cast<double>(d.memory_bytes) / (1 << 30), d.compute_capability_major, d.compute_capability_minor, d.driver.c_str(), d.uuid.c_str());
  ppft::trainer::gpu->Use(0);
  return RUN_ALL_TESTS();
}
