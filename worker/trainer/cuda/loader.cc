#include "worker/trainer/cuda/loader.h"

#include <ATen/Version.h>
#include <dlfcn.h>
#include <torch/headeronly/version.h>
#include <unistd.h>

#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"

namespace ppft::trainer {
namespace {

std::string FolderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string ProgramFolder() {
  char path[4096];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  return size > 0 ? FolderOf(std::string(path, static_cast<size_t>(size))) : ".";
}

}  // namespace

std::string LibTorchFolder() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&at::show_config), &info) != 0 && info.dli_fname != nullptr ? FolderOf(info.dli_fname) : "";
}

// From the installation's version.py: at::show_config() would fix ATen's CUDA hooks to "none" before libtorch_cuda is there.
std::string LibTorchVersion() {
  const absl::StatusOr<std::string> text = ReadFile(absl::StrCat(LibTorchFolder(), "/../version.py"));
  const std::string key = "__version__ = '";
  const size_t at = text.ok() ? text->find(key) : std::string::npos;
  if (at == std::string::npos) return "";
  const size_t begin = at + key.size();
  return text->substr(begin, text->find_first_not_of("0123456789.", begin) - begin);
}

namespace {

std::string LastError() {
  const char* error = dlerror();
  return error != nullptr ? error : "unknown error";
}

}  // namespace

absl::StatusOr<CudaRuntime*> LoadCudaPlugin(const std::string& path) {
  static CudaRuntime* loaded = nullptr;
  if (loaded != nullptr) return loaded;
  setenv("CUDA_MODULE_LOADING", "LAZY", /*overwrite=*/0);
  setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", "libcudart.so.13", /*overwrite=*/0);  // LibTorch's, whatever else the machine has
  if (const std::string version = LibTorchVersion(); version != TORCH_VERSION) {
    return absl::FailedPreconditionError(absl::StrCat("LibTorch ", version, " at ", LibTorchFolder(), " is not ", TORCH_VERSION,
                                                      ", which this program was built with: install torch==", TORCH_VERSION, " or set PPFT_TORCH_ROOT"));
  }
  // Loading it by its full path lets its own run path find NVIDIA's libraries; the plugin then finds all of them loaded.
  const std::string torch_cuda = absl::StrCat(LibTorchFolder(), "/libtorch_cuda.so");
  if (dlopen(torch_cuda.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("LibTorch's CUDA part cannot be loaded (", LastError(), "): install torch==", TORCH_VERSION,
                                                      " with all its packages, or set PPFT_TORCH_ROOT to such an installation"));
  }
  std::string file = path;
  if (file.empty()) {
    file = absl::StrCat(ProgramFolder(), "/libppft_cuda.so");
    if (access(file.c_str(), R_OK) != 0) file = absl::StrCat(ProgramFolder(), "/../lib/libppft_cuda.so");
  }
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) return absl::FailedPreconditionError(absl::StrCat("the CUDA plugin cannot be loaded: ", LastError()));
  const auto entry = reinterpret_cast<decltype(&ppft_cuda_plugin)>(dlsym(library, "ppft_cuda_plugin"));
  const PpftCudaPlugin* plugin = entry != nullptr ? entry(kCudaPluginAbi) : nullptr;
  if (plugin == nullptr || plugin->abi_version != kCudaPluginAbi) {
    return absl::FailedPreconditionError(absl::StrCat("the CUDA plugin ", file, " is of another build than this program: install both from one build"));
  }
  if (std::string(plugin->torch_version) != TORCH_VERSION) {
    return absl::FailedPreconditionError(
        absl::StrCat("the CUDA plugin ", file, " was built with LibTorch ", plugin->torch_version, ", this program with ", TORCH_VERSION));
  }
  loaded = plugin->runtime;
  return loaded;
}

}  // namespace ppft::trainer
