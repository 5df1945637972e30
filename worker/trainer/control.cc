#include "worker/trainer/control.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "common/base/logging.h"

namespace ppft::trainer {
namespace {

constexpr uint32_t kMaxFrameBytes = 1u << 30;
constexpr int kExitOrphaned = 3;

// Ends the process if the agent is gone.
void ReadOrExit(int fd, char* data, size_t size) {
  while (size > 0) {
    const ssize_t n = read(fd, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) _exit(kExitOrphaned);
    data += n;
    size -= static_cast<size_t>(n);
  }
}

}  // namespace

Control::Control(Fd socket) : socket_(std::move(socket)) {
  // Runs until the process ends; it holds nothing that needs an orderly end.
  std::thread([this] { ReadLoop(); }).detach();
}

void Control::ReadLoop() {
  while (true) {
    uint32_t size = 0;
    ReadOrExit(socket_.get(), reinterpret_cast<char*>(&size), sizeof(size));
    if (size > kMaxFrameBytes) {
      LogError("the agent sent a frame of ", size, " bytes");
      _exit(kExitOrphaned);
    }
    std::string bytes(size, '\0');
    ReadOrExit(socket_.get(), bytes.data(), size);
    absl::StatusOr<AgentInput> input = ParseAgentMessage(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    if (!input.ok()) {
      if (!start_.has_value()) start_.emplace(input.status());
      if (!peers_.has_value()) peers_.emplace(input.status());
    } else if (input->start.has_value()) {
      start_.emplace(*std::move(input->start));
    } else if (input->peers.has_value()) {
      peers_.emplace(*std::move(input->peers));
    } else {
      trace_orders_.Set(*input->trace);
    }
    changed_.notify_all();
  }
}

absl::StatusOr<TrainerConfig> Control::AwaitStart() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return start_.has_value(); });
  return *std::move(start_);
}

absl::StatusOr<std::vector<std::string>> Control::AwaitPeers() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return peers_.has_value(); });
  return *std::move(peers_);
}

void Control::Log(Severity severity, const std::string& text) {
  LogLineToStderr(severity, text);
  Write(EncodeLog(source_, severity, text));
}

void Control::Write(absl::string_view message) {
  std::string frame(sizeof(uint32_t), '\0');
  const auto size = static_cast<uint32_t>(message.size());
  std::memcpy(frame.data(), &size, sizeof(size));
  frame.append(message.data(), message.size());
  std::lock_guard<std::mutex> lock(write_mutex_);
  const absl::Status written = WriteAll(socket_.get(), frame, "control socket");
  if (!written.ok()) _exit(kExitOrphaned);
}

}  // namespace ppft::trainer
