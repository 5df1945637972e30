#include "worker/agent/cuda_devices.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/status.h"

namespace ppft::agent {
namespace {

// A cold disk and a driver that initialises many devices.
constexpr absl::Duration kProbeTimeout = absl::Minutes(3);
constexpr size_t kMaxOutput = 1 << 20;
// The plugin's kernels are compiled for these and later ones.
constexpr double kLeastComputeCapability = 8.0;

std::string EnvironmentValue(const char* name) {
  const char* value = getenv(name);
  return value == nullptr ? "" : value;
}

std::string LastLine(const std::string& text) {
  const std::vector<std::string> lines = absl::StrSplit(text, '\n', absl::SkipWhitespace());
  return lines.empty() ? "" : lines.back();
}

// Reads both ends until they are closed, the limit or the deadline; false at the deadline.
bool Drain(int out, int error, absl::Time deadline, ProgramOutput* output) {
  struct pollfd fds[2] = {{out, POLLIN, 0}, {error, POLLIN, 0}};
  std::string* const texts[2] = {&output->out, &output->error};
  while (fds[0].fd >= 0 || fds[1].fd >= 0) {
    const int64_t left = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (left <= 0) return false;
    if (poll(fds, 2, static_cast<int>(left)) < 0 && errno != EINTR) return false;
    for (int i = 0; i < 2; ++i) {
      if (fds[i].fd < 0 || fds[i].revents == 0) continue;
      char buffer[4096];
      const ssize_t n = read(fds[i].fd, buffer, sizeof(buffer));
      if (n <= 0) fds[i].fd = -1;
      if (n > 0 && texts[i]->size() < kMaxOutput) texts[i]->append(buffer, static_cast<size_t>(n));
    }
  }
  return true;
}

// The folder of the package that the running python3 would import; "" without one.
std::string TorchOfPython() {
  const absl::StatusOr<ProgramOutput> ran =
      RunProgram({"/usr/bin/env", "python3", "-c", "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"}, {}, kProbeTimeout);
  return ran.ok() && ran->status == 0 ? LastLine(ran->out) : "";
}

// Why the device of this entry of a probe cannot be used; "" if it can.
std::string WhyLeftOut(const nlohmann::json& entry) {
  const std::string capability = entry.value("compute_capability", "");
  double number = 0;
  if (absl::SimpleAtod(capability, &number) && number >= kLeastComputeCapability) return "";
  return absl::StrCat("device ", entry.value("index", 0), " (", entry.value("name", ""), ") has compute capability ", capability, ": trainers need ",
                      absl::StrFormat("%.1f", kLeastComputeCapability), " or later");
}

// Why this trainer does not start, in a sentence.
std::string WhyNot(const ProgramOutput& ran) {
  const std::string line = LastLine(ran.error);
  return line.empty() ? absl::StrCat("it ended with status ", ran.status) : line;
}

// Where the trainer could not even ask the driver: whether there is one. "" if there is a sign of it.
std::string NoDriver() {
  constexpr char kVersion[] = "/proc/driver/nvidia/version";
  if (PathExists(kVersion) || PathExists("/dev/dxg")) return "";
  return absl::StrCat("; this host shows no NVIDIA driver either (", kVersion, "): without a GPU, offer CPU slots with --devices cpu:N");
}

}  // namespace

absl::StatusOr<ProgramOutput> RunProgram(const std::vector<std::string>& command, const std::vector<std::string>& environment, absl::Duration timeout) {
  int out[2], error[2];
  if (pipe2(out, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  Fd out_read(out[0]), out_write(out[1]);
  if (pipe2(error, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  Fd error_read(error[0]), error_write(error[1]);
  std::vector<std::string> variables = environment;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const absl::string_view name = absl::string_view(*variable).substr(0, absl::string_view(*variable).find('=') + 1);
    if (std::none_of(environment.begin(), environment.end(), [&](const std::string& ours) { return absl::StartsWith(ours, name); }))
      variables.push_back(*variable);
  }
  std::vector<char*> argv, envp;
  for (const std::string& argument : command) argv.push_back(const_cast<char*>(argument.c_str()));
  for (std::string& variable : variables) envp.push_back(variable.data());
  argv.push_back(nullptr);
  envp.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, out_write.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, error_write.get(), STDERR_FILENO);
  pid_t pid = 0;
  const int spawned = posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), envp.data());
  posix_spawn_file_actions_destroy(&actions);
  if (spawned != 0) return ErrnoStatus(spawned, command[0]);
  out_write = Fd();
  error_write = Fd();
  ProgramOutput output;
  const bool in_time = Drain(out_read.get(), error_read.get(), absl::Now() + timeout, &output);
  if (!in_time) kill(pid, SIGKILL);
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (!in_time) return absl::DeadlineExceededError(absl::StrCat(command[0], " did not end within ", absl::FormatDuration(timeout)));
  output.status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  return output;
}

std::vector<std::string> TorchEnvironment(const std::string& torch) {
  std::vector<std::string> folders = {JoinPath(torch, "lib")};
  for (const char* package : {"nccl", "cu13", "cudnn", "cusparselt", "nvshmem"}) folders.push_back(absl::StrCat(torch, "/../nvidia/", package, "/lib"));
  const std::string before = EnvironmentValue("LD_LIBRARY_PATH");
  if (!before.empty()) folders.push_back(before);
  return {absl::StrCat("LD_LIBRARY_PATH=", absl::StrJoin(folders, ":"))};
}

absl::StatusOr<TorchOffer> FindTorch(const std::string& trainer) {
  const std::string root = EnvironmentValue("PPFT_TORCH_ROOT");
  if (!root.empty() && !PathExists(JoinPath(root, "lib/libtorch_cpu.so"))) {
    return absl::FailedPreconditionError(absl::StrCat("PPFT_TORCH_ROOT=", root, " holds no lib/libtorch_cpu.so: set it to the torch folder of torch 2.11"));
  }
  if (root.empty()) {
    PPFT_ASSIGN_OR_RETURN(const ProgramOutput alone, RunProgram({trainer, "--version"}, {}, kProbeTimeout));
    if (alone.status != 127) return TorchOffer{{}, LastLine(alone.out)};
  }
  const std::string torch = root.empty() ? TorchOfPython() : root;
  if (torch.empty()) {
    return absl::FailedPreconditionError("trainers need LibTorch, and neither PPFT_TORCH_ROOT nor python3 leads to one: install torch==2.11.0");
  }
  std::vector<std::string> environment = TorchEnvironment(torch);
  PPFT_ASSIGN_OR_RETURN(const ProgramOutput with, RunProgram({trainer, "--version"}, environment, kProbeTimeout));
  if (with.status != 0) {
    return absl::FailedPreconditionError(absl::StrCat("the trainer does not run with the torch in ", torch, " (", WhyNot(with), "): it needs torch 2.11"));
  }
  return TorchOffer{environment, LastLine(with.out)};
}

absl::StatusOr<CudaOffer> OfferCudaDevices(absl::string_view which, const std::string& trainer) {
  std::set<int> wanted;
  if (which != "all") {
    for (const absl::string_view word : absl::StrSplit(which, ',')) {
      int index = 0;
      if (!absl::SimpleAtoi(word, &index) || index < 0 || !wanted.insert(index).second) {
        return absl::InvalidArgumentError(absl::StrCat("--devices \"cuda:", which, "\" must be cuda:all or different indices, e.g. cuda:0,2"));
      }
    }
  }
  // A trainer may have been built beside a LibTorch without CUDA; then the host's python3 may have one with it.
  std::vector<std::vector<std::string>> environments;
  PPFT_ASSIGN_OR_RETURN(TorchOffer found, FindTorch(trainer));
  const bool alone = found.environment.empty();
  environments.push_back(std::move(found.environment));
  std::string error;
  for (size_t i = 0; i < environments.size(); ++i) {
    PPFT_ASSIGN_OR_RETURN(const ProgramOutput ran, RunProgram({trainer, "--probe-devices"}, environments[i], kProbeTimeout));
    const nlohmann::json probe = nlohmann::json::parse(LastLine(ran.out), nullptr, /*allow_exceptions=*/false);
    if (ran.status == 0 && probe.is_object() && probe.contains("devices") && !probe["devices"].empty()) {
      CudaOffer offer;
      offer.environment = environments[i];
      offer.torch = probe.value("torch", "");
      offer.nccl = probe.value("nccl", "");
      std::string left_out;
      for (const auto& entry : probe["devices"]) {
        const int index = entry.value("index", 0);
        if (which != "all" && wanted.erase(index) == 0) continue;
        const std::string reason = WhyLeftOut(entry);
        if (!reason.empty() && which != "all") return absl::FailedPreconditionError(absl::StrCat("--devices cuda:", which, ": ", reason));
        if (!reason.empty()) {
          LogWarning("left out: ", reason);
          left_out = reason;
          continue;
        }
        v1::Device& device = offer.devices.emplace_back();
        device.set_id(absl::StrCat("cuda:", index));
        device.set_kind("cuda");
        device.set_name(entry.value("name", ""));
        device.set_memory_bytes(entry.value("memory_bytes", int64_t{0}));
        device.set_compute_capability(entry.value("compute_capability", ""));
        device.set_driver(entry.value("driver", ""));
      }
      if (which != "all" && !wanted.empty()) {
        return absl::InvalidArgumentError(
            absl::StrCat("--devices cuda:", which, ": there is no device ", *wanted.begin(), ", only ", probe["devices"].size(), " of them"));
      }
      if (offer.devices.empty()) return absl::FailedPreconditionError(absl::StrCat("--devices cuda:all: ", left_out));
      return offer;
    }
    error = probe.is_object() && probe.contains("error") ? probe.value("error", "") : absl::StrCat("the trainer cannot look for devices: ", WhyNot(ran));
    if (i == 0 && alone && absl::StrContains(error, "LibTorch")) {
      const std::string torch = TorchOfPython();
      if (!torch.empty()) environments.push_back(TorchEnvironment(torch));
    }
  }
  return absl::FailedPreconditionError(absl::StrCat("--devices cuda:", which, ": ", error, absl::StrContains(error, "driver") ? "" : NoDriver()));
}

std::string VisibleDevice(absl::string_view device, absl::string_view visible) {
  std::string index(device.substr(device.find(':') + 1));
  size_t position = 0;
  const std::vector<std::string> names = absl::StrSplit(visible, ',', absl::SkipEmpty());
  if (!names.empty() && absl::SimpleAtoi(index, &position) && position < names.size()) index = names[position];
  return absl::StrCat("CUDA_VISIBLE_DEVICES=", index);
}

}  // namespace ppft::agent
