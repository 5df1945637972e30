#include "worker/trainer/cuda/probe.h"

#include <dlfcn.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "worker/trainer/cuda/loader.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

// Of the NCCL that the plugin brought with it: "2.28.9".
std::string NcclVersion() {
  const auto get_version = reinterpret_cast<int (*)(int*)>(dlsym(RTLD_DEFAULT, "ncclGetVersion"));
  int number = 0;
  if (get_version == nullptr || get_version(&number) != 0) return "";
  return absl::StrCat(number / 10000, ".", number % 10000 / 100, ".", number % 100);
}

}  // namespace

std::string RunningTorch() { return absl::StrCat("LibTorch ", LibTorchVersion(), " at ", LibTorchFolder()); }

std::string ProbeDevices() {
  nlohmann::json out;
  out["devices"] = nlohmann::json::array();
  out["torch"] = RunningTorch();
  const absl::Status status = CatchTorch("", [&]() -> absl::Status {
    const absl::StatusOr<CudaRuntime*> cuda = LoadCudaPlugin("");
    if (!cuda.ok()) return cuda.status();
    std::string reason;
    out["nccl"] = NcclVersion();
    for (const CudaDevice& device : (*cuda)->Devices(&reason)) {
      out["devices"].push_back({{"index", device.index},
                                {"name", device.name},
                                {"uuid", device.uuid},
                                {"memory_bytes", device.memory_bytes},
                                {"compute_capability", absl::StrCat(device.compute_capability_major, ".", device.compute_capability_minor)},
                                {"driver", device.driver}});
    }
    return out["devices"].empty() ? absl::FailedPreconditionError(reason) : absl::OkStatus();
  });
  if (!status.ok()) out["error"] = std::string(status.message());
  return out.dump();
}

}  // namespace ppft::trainer
