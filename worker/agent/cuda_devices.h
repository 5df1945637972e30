// GPUs and the LibTorch that trainers need, found without either in this process: a trainer is asked.
//
// Thread: any; what asks a trainer blocks until it has answered or run out of time.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "ppft/v1/cluster.pb.h"

namespace ppft::agent {

struct ProgramOutput {
  int status = 0;  // exit status, or 128 + signal
  std::string out;
  std::string error;
};
// Runs a program to its end, with "NAME=value" on top of this process's environment. DEADLINE_EXCEEDED after killing it.
absl::StatusOr<ProgramOutput> RunProgram(const std::vector<std::string>& command, const std::vector<std::string>& environment, absl::Duration timeout);

// The environment that lets `trainer` find the LibTorch in `torch` (a folder with lib/libtorch_cpu.so), its NVIDIA libraries beside it.
std::vector<std::string> TorchEnvironment(const std::string& torch);

// The LibTorch of trainers.
struct TorchOffer {
  std::vector<std::string> environment;  // what to start them with; empty if they find it by themselves
  std::string torch;                     // its version and folder, as the trainer says it
};
// Where they do not find one by themselves: from PPFT_TORCH_ROOT or what the running python3 would import.
// FAILED_PRECONDITION: there is none, or none of the version that the trainer was built with; one sentence.
absl::StatusOr<TorchOffer> FindTorch(const std::string& trainer);

struct CudaOffer {
  std::vector<v1::Device> devices;
  std::vector<std::string> environment;  // for trainers on them
  std::string torch;
  std::string nccl;
};
// `which`: "all" or "0,2", indices among the visible devices. INVALID_ARGUMENT for other words or an index that is not there, FAILED_PRECONDITION with the
// reason if there is no usable device.
absl::StatusOr<CudaOffer> OfferCudaDevices(absl::string_view which, const std::string& trainer);

// CUDA_VISIBLE_DEVICES=… for a trainer on "cuda:1", given the value that this process has ("" if none).
std::string VisibleDevice(absl::string_view device, absl::string_view visible);

}  // namespace ppft::agent
