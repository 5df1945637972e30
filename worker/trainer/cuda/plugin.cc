#include "worker/trainer/cuda/plugin.h"

#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/headeronly/version.h>

#include <cstdio>
#include <map>

#include "worker/trainer/comm/nccl/nccl_comm.h"
#include "worker/trainer/cuda/attention.h"
#include "worker/trainer/cuda/cuda_timer.h"
#include "worker/trainer/kernels/cuda/cuda_kernels.h"
#include "worker/trainer/kernels/cuda/device_optimizer.h"
#include "worker/trainer/kernels/cuda/launch.h"

namespace ppft::trainer::cuda {
namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

// The driver's own version, which only NVML knows; the newest CUDA version that it supports if NVML is not there.
std::string DriverVersion() {
  if (void* nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL); nvml != nullptr) {
    const auto init = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlInit_v2"));
    const auto version = reinterpret_cast<int (*)(char*, unsigned)>(dlsym(nvml, "nvmlSystemGetDriverVersion"));
    const auto shutdown = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlShutdown"));
    char text[96] = {};
    if (init != nullptr && version != nullptr && shutdown != nullptr && init() == 0) {
      const bool known = version(text, sizeof(text)) == 0;
      shutdown();
      if (known) return text;
    }
  }
  int number = 0;
  if (cudaDriverGetVersion(&number) != cudaSuccess || number == 0) return "";
  return "CUDA " + std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string WhyNoDevice(cudaError_t error) {
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr) return "no NVIDIA driver on this machine (libcuda.so.1 is not found)";
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (error == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver (" + DriverVersion() + ") is too old: CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
           std::to_string(CUDART_VERSION % 1000 / 10) + " is needed, it supports " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  }
  if (error == cudaErrorNoDevice) return "no CUDA device is visible (CUDA_VISIBLE_DEVICES, or none in this machine)";
  return cudaGetErrorString(error);
}

std::string UuidText(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char two[3];
    std::snprintf(two, sizeof(two), "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += two;
  }
  return text;
}

class CudaRuntimeImpl final : public CudaRuntime {
 public:
  std::vector<CudaDevice> Devices(std::string* reason) override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
      *reason = WhyNoDevice(error == cudaSuccess ? cudaErrorNoDevice : error);
      cudaGetLastError();  // the answer is given; later calls shall not find it
      return {};
    }
    const std::string driver = DriverVersion();
    std::vector<CudaDevice> devices;
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties;
      Check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
      CudaDevice device;
      device.index = i;
      device.name = properties.name;
      device.uuid = UuidText(properties.uuid);
      device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
      device.compute_capability_major = properties.major;
      device.compute_capability_minor = properties.minor;
      device.driver = driver;
      devices.push_back(std::move(device));
    }
    return devices;
  }

  void Use(int device) override {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::set_device(index);
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index));
  }

  void Synchronize(int device) override {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    Check(cudaDeviceSynchronize(), "CUDA device");
  }

  void LoadAttention(int device) override {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    Attention(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device))).Load();
  }

  Kernels& KernelsOf(int device) override {
    std::unique_ptr<Kernels>& kernels = kernels_[device];
    if (kernels == nullptr) kernels = MakeKernels(device);
    return *kernels;
  }

  std::unique_ptr<DeviceOptimizer> MakeOptimizer(FlatParameters parameters) override { return MakeDeviceOptimizer(std::move(parameters)); }

  DeviceComms& CommsOf(int device) override {
    std::unique_ptr<DeviceComms>& comms = comms_[device];
    if (comms == nullptr) comms = MakeNcclComms(device);
    return *comms;
  }

  // Not with warnings only: flash attention's backward pass would then keep its faster way, whose sums differ from run to run.
  void SetDeterministic(bool deterministic) override {
    at::globalContext().setDeterministicAlgorithms(deterministic, /*warn_only=*/false);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  }

  CudaMemory Memory(int device) override {
    const auto stats = allocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    constexpr size_t kAll = 0;  // the aggregate over small and large blocks
    CudaMemory memory;
    memory.allocated_bytes = stats.allocated_bytes[kAll].current;
    memory.peak_allocated_bytes = stats.allocated_bytes[kAll].peak;
    memory.reserved_bytes = stats.reserved_bytes[kAll].current;
    memory.peak_reserved_bytes = stats.reserved_bytes[kAll].peak;
    size_t free = 0, total = 0;
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    Check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    memory.device_free_bytes = static_cast<int64_t>(free);
    memory.device_bytes = static_cast<int64_t>(total);
    return memory;
  }

  void ResetPeakMemory(int device) override { allocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); }
  void ReleaseCachedMemory() override { allocator::emptyCache(); }
  std::unique_ptr<DeviceTimer> MakeTimer() override { return MakeCudaTimer(); }

 private:
  std::map<int, std::unique_ptr<Kernels>> kernels_;
  std::map<int, std::unique_ptr<DeviceComms>> comms_;
};

}  // namespace
}  // namespace ppft::trainer::cuda

const PpftCudaPlugin* ppft_cuda_plugin(int abi_version) {
  // Never destroyed: CUDA's own state may be gone when static objects are.
  static const PpftCudaPlugin* const plugin = new PpftCudaPlugin{ppft::trainer::kCudaPluginAbi, TORCH_VERSION, new ppft::trainer::cuda::CudaRuntimeImpl};
  return abi_version == ppft::trainer::kCudaPluginAbi ? plugin : nullptr;
}
