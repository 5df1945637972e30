// ppft-trainer --device ID: one rank of a job. Started by ppft-worker with a socket on descriptor 3; everything else comes through that. It makes its device
// ready while the worker still fetches what it is to run.
// ppft-trainer --version: the LibTorch that it runs with. ppft-trainer --probe-devices: the GPUs that it could use, as one line of JSON.
#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/format.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "worker/trainer/beat.h"
#include "worker/trainer/comm/tcp_transport.h"
#include "worker/trainer/control.h"
#include "worker/trainer/cuda/loader.h"
#include "worker/trainer/cuda/probe.h"
#include "worker/trainer/engine/failure.h"
#include "worker/trainer/engine/trainer.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

constexpr int kControlFd = 3;
// Of a device's memory: what others hold beyond this is not the context and the communicators of this process.
constexpr int64_t kForeignBytes = int64_t{4} << 30;
constexpr char kForeignRemedy[] = "end the other processes on that device, or give the worker devices of its own; the job tries again by itself";

// The first product loads cuBLAS and its kernels.
void WarmUp(CudaRuntime& cuda) {
  const at::Tensor square = at::zeros({64, 64}, at::TensorOptions().device(at::kCUDA, 0).dtype(at::kBFloat16));
  at::mm(square, square);
  cuda.Synchronize(0);
}

// The device of this process.
struct UsedDevice {
  CudaRuntime* cuda = nullptr;  // the plugin, with this thread on its one visible device; nullptr where the rank's device is no GPU
  std::string gpu;              // "cuda:1, GPU-…"
};

absl::StatusOr<UsedDevice> UseDevice(const std::string& device) {
  if (!absl::StartsWith(device, "cuda")) return UsedDevice{};
  const auto failed = [&](const absl::Status& status) {
    if (IsOutOfDeviceMemory(status)) {
      return WithReason(Annotate(status, device), "OUT_OF_DEVICE_MEMORY", "INFRASTRUCTURE", kForeignRemedy);
    }
    return WithReason(
        Annotate(status, device), "DEVICE_ERROR", "OPERATOR",
        "look at `ppft-trainer --probe-devices` on the worker's host, and for lines with \"NVRM: Xid\" in its kernel log (dmesg, or journalctl -k)");
  };
  absl::StatusOr<CudaRuntime*> cuda = LoadCudaPlugin("");
  if (!cuda.ok()) return failed(cuda.status());
  UsedDevice result{*cuda, device};
  const absl::Status used = CatchTorch("", [&]() -> absl::Status {
    std::string reason;
    const std::vector<CudaDevice> devices = (*cuda)->Devices(&reason);
    if (devices.empty()) return absl::FailedPreconditionError(reason);
    absl::StrAppend(&result.gpu, ", ", devices[0].uuid);
    (*cuda)->Use(0);
    WarmUp(**cuda);
    const char* deterministic = getenv("PPFT_DETERMINISTIC");
    if (deterministic != nullptr && absl::string_view(deterministic) == "1") (*cuda)->SetDeterministic(true);
    return absl::OkStatus();
  });
  if (!used.ok()) return failed(used);
  return result;
}

// Names what there was and what was planned, where the device's memory has run out.
absl::Status ExplainMemory(const absl::Status& status, const TrainerConfig& config, CudaRuntime* cuda) {
  if (cuda == nullptr || !IsOutOfDeviceMemory(status)) return status;
  const absl::StatusOr<CudaMemory> memory = CatchTorch("", [&]() -> absl::StatusOr<CudaMemory> { return cuda->Memory(0); });
  std::string text = absl::StrCat(" (the plan's estimate: ", FormatBytes(config.me().peak_bytes));
  if (memory.ok()) {
    absl::StrAppend(&text, "; this rank held ", FormatBytes(memory->reserved_bytes), " of the device's ", FormatBytes(memory->device_bytes), ", ",
                    FormatBytes(memory->device_free_bytes), " were free");
  }
  const int64_t others = memory.ok() ? memory->device_bytes - memory->device_free_bytes - memory->reserved_bytes : 0;
  absl::Status explained;
  if (others > kForeignBytes) {
    // The job would fit where it is alone: another attempt may succeed.
    absl::StrAppend(&text, "; other processes hold ", FormatBytes(others), " of it");
    explained = WithReason(status, "OUT_OF_DEVICE_MEMORY", "INFRASTRUCTURE", kForeignRemedy);
  } else {
    explained = WithReason(status, "OUT_OF_DEVICE_MEMORY", "USER",
                           "lower training.micro_batch_size or data.sequence_len, set parallel.activation_checkpointing: full, or use more pipeline stages");
  }
  return WithMessage(explained, absl::StrCat(explained.message(), text, ")"));
}

absl::Status Work(const std::string& device, Control& control, std::unique_ptr<Trainer>& trainer) {
  const absl::StatusOr<UsedDevice> used = UseDevice(device);
  std::jthread attention([cuda = used.ok() ? used->cuda : nullptr] {
    if (cuda == nullptr) return;
    // What goes wrong here goes wrong again, and is told, where it is needed.
    CatchTorch("", [&] {
      cuda->LoadAttention(0);
      return absl::OkStatus();
    }).IgnoreError();
  });
  PPFT_ASSIGN_OR_RETURN(const TrainerConfig config, control.AwaitStart());
  control.SetSource(absl::StrCat("rank-", config.rank));
  at::set_num_threads(config.plan.threads_per_rank);
  Beat* beat = config.beat_path.empty() ? nullptr : MapBeat(config.beat_path);
  if (beat != nullptr) beat->magic.store(kBeatMagic);
  PPFT_ASSIGN_OR_RETURN(TcpListener listener, TcpListener::Open(config.listen_address));
  control.Listening(listener.address());
  PPFT_RETURN_IF_ERROR(WithReason(CheckConfig(config), "SPEC_INVALID", "USER", "correct the job and submit it again"));
  PPFT_RETURN_IF_ERROR(used.status());
  CudaRuntime* const cuda = used->cuda;
  if (config.me().device != device) return absl::InternalError(absl::StrCat("started for ", device, " and told to use ", config.me().device));
  trainer = std::make_unique<Trainer>(config, &control, beat, cuda);
  trainer->FollowOrders(&control.trace_orders());
  const auto run = [&]() -> absl::Status {
    PPFT_RETURN_IF_ERROR(trainer->Load());
    attention.join();  // nothing that may make the device wait runs beside transfers
    PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> endpoints, control.AwaitPeers());
    PPFT_RETURN_IF_ERROR(trainer->Connect(std::move(listener), endpoints));
    return trainer->Run();
  };
  return BlameGpu(ExplainMemory(CatchTorch(config.me().device, run), config, cuda), used->gpu);
}

int Main(int argc, char** argv) {
  if (argc == 2 && absl::string_view(argv[1]) == "--version") {
    std::printf("%s\n", RunningTorch().c_str());
    return 0;
  }
  if (argc == 2 && absl::string_view(argv[1]) == "--probe-devices") {
    std::printf("%s\n", ProbeDevices().c_str());
    std::fflush(stdout);
    _exit(0);  // a driver in trouble may not end in order
  }
  SetLogComponent("trainer");
  signal(SIGPIPE, SIG_IGN);
  int type = 0;
  socklen_t size = sizeof(type);
  if (argc != 3 || absl::string_view(argv[1]) != "--device" || getsockopt(kControlFd, SOL_SOCKET, SO_TYPE, &type, &size) != 0) {
    std::fprintf(stderr, "ppft-trainer is started by ppft-worker, with a socket on descriptor %d\n", kControlFd);
    return 2;
  }
  Control control{Fd(kControlFd)};
  std::unique_ptr<Trainer> trainer;
  const absl::Status status = Work(argv[2], control, trainer);
  if (!status.ok()) {
    const int64_t step = trainer == nullptr ? 0 : trainer->step();
    control.Log(Severity::kError, std::string(status.message()));
    control.Failed(DescribeFailure(status, step));
    if (trainer != nullptr) trainer->Abort(status);
  }
  // No destructors: threads may still hold buffers, and everything that matters is on disk or sent.
  std::fflush(stderr);
  _exit(status.ok() ? 0 : 1);
}

}  // namespace
}  // namespace ppft::trainer

int main(int argc, char** argv) { return ppft::trainer::Main(argc, argv); }
