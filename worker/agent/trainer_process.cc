#include "worker/agent/trainer_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"
#include "nlohmann/json.hpp"

namespace ppft::agent {
namespace {

// Everything the child needs is laid out before fork: between fork and exec only system calls are safe.
struct Arguments {
  std::vector<std::string> environment;
  std::vector<char*> envp;
  std::vector<char*> argv;
};

// Points into `command`.
Arguments LayOut(const TrainerCommand& command) {
  Arguments out;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const absl::string_view name = absl::string_view(*variable).substr(0, absl::string_view(*variable).find('='));
    bool replaced = false;
    for (const std::string& ours : command.environment) replaced = replaced || absl::StartsWith(ours, absl::StrCat(name, "="));
    if (!replaced) out.environment.push_back(*variable);
  }
  out.environment.insert(out.environment.end(), command.environment.begin(), command.environment.end());
  for (std::string& variable : out.environment) out.envp.push_back(variable.data());
  out.envp.push_back(nullptr);
  out.argv = {const_cast<char*>(command.binary.c_str())};
  for (const std::string& argument : command.arguments) out.argv.push_back(const_cast<char*>(argument.c_str()));
  out.argv.push_back(nullptr);
  return out;
}

// What a program wrote, as a message may carry it: protobuf reads no string that is not UTF-8.
std::string ValidUtf8(const std::string& text) {
  using nlohmann::json;
  return json::parse(json(text).dump(-1, ' ', false, json::error_handler_t::replace)).get<std::string>();
}

}  // namespace

TrainerProcess::~TrainerProcess() {
  if (alive()) {
    Kill(SIGKILL);
    Wait();
  }
}

absl::Status TrainerProcess::Start(const TrainerCommand& command) {
  directory_ = command.directory;
  wake_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_) return ErrnoStatus(errno, "eventfd");
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoStatus(errno, "socketpair");
  Fd ours(pair[0]), theirs(pair[1]);
  Fd log(open(JoinPath(directory_, "stderr.log").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!log) return ErrnoStatus(errno, JoinPath(directory_, "stderr.log"));
  Arguments arguments = LayOut(command);
  const pid_t agent = getpid();
  std::lock_guard<std::mutex> lock(pid_mutex_);
  const pid_t pid = fork();
  if (pid < 0) return ErrnoStatus(errno, "fork");
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != agent) _exit(127);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    if (chdir(command.directory.c_str()) != 0 || dup2(log.get(), STDOUT_FILENO) < 0 || dup2(log.get(), STDERR_FILENO) < 0) _exit(126);
    // dup2 clears close-on-exec unless both are the same descriptor.
    if (theirs.get() == 3 ? fcntl(3, F_SETFD, 0) != 0 : dup2(theirs.get(), 3) < 0) _exit(126);
    execve(command.binary.c_str(), arguments.argv.data(), arguments.envp.data());
    _exit(127);
  }
  pid_ = pid;
  socket_ = std::move(ours);
  return absl::OkStatus();
}

absl::Status TrainerProcess::Send(const v1::AgentMessage& message) {
  const std::string body = message.SerializeAsString();
  if (body.size() > kMaxFrameBytes) return absl::InvalidArgumentError(absl::StrCat("a frame of ", body.size(), " bytes for the trainer is too long"));
  const uint32_t size = static_cast<uint32_t>(body.size());
  std::lock_guard<std::mutex> lock(send_mutex_);
  const bool waits = !unsent_.empty();
  unsent_.append(reinterpret_cast<const char*>(&size), sizeof(size));
  unsent_ += body;
  if (waits) return absl::OkStatus();  // Receive knows
  PPFT_RETURN_IF_ERROR(Flush());
  if (!unsent_.empty()) eventfd_write(wake_.get(), 1);
  return absl::OkStatus();
}

absl::Status TrainerProcess::Flush() {
  size_t done = 0;
  absl::Status status;
  while (done < unsent_.size()) {
    const ssize_t put = send(socket_.get(), unsent_.data() + done, unsent_.size() - done, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && errno == EAGAIN) break;
    if (put < 0) {
      status = ErrnoStatus(errno, "trainer socket");
      done = unsent_.size();  // nobody will read it
      break;
    }
    done += static_cast<size_t>(put);
  }
  unsent_.erase(0, done);
  return status;
}

absl::Status TrainerProcess::AwaitInput() {
  while (true) {
    pollfd waits[] = {{socket_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    {
      std::lock_guard<std::mutex> lock(send_mutex_);
      if (!unsent_.empty()) waits[0].events |= POLLOUT;
    }
    if (poll(waits, 2, -1) < 0 && errno != EINTR) return ErrnoStatus(errno, "trainer socket");
    eventfd_t woken;
    if (waits[1].revents != 0) eventfd_read(wake_.get(), &woken);
    if ((waits[0].revents & POLLOUT) != 0) {
      std::lock_guard<std::mutex> lock(send_mutex_);
      Flush().IgnoreError();  // the trainer is gone: the next read says so
    }
    if ((waits[0].revents & ~POLLOUT) != 0) return absl::OkStatus();
  }
}

absl::Status TrainerProcess::ReadExactly(char* data, size_t size, bool at_frame_start) {
  size_t done = 0;
  while (done < size) {
    const ssize_t got = recv(socket_.get(), data + done, size - done, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) {
      PPFT_RETURN_IF_ERROR(AwaitInput());
      continue;
    }
    if (got < 0 && errno != ECONNRESET) return ErrnoStatus(errno, "trainer socket");
    if (got <= 0) {
      if (at_frame_start && done == 0) return absl::OutOfRangeError("closed");
      return absl::DataLossError("the trainer's last frame is cut");
    }
    done += static_cast<size_t>(got);
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::TrainerReport> TrainerProcess::Receive() {
  uint32_t size = 0;
  PPFT_RETURN_IF_ERROR(ReadExactly(reinterpret_cast<char*>(&size), sizeof(size), true));
  if (size > kMaxFrameBytes) return absl::DataLossError(absl::StrCat("the trainer announced a frame of ", size, " bytes"));
  std::string body(size, '\0');
  PPFT_RETURN_IF_ERROR(ReadExactly(body.data(), size, false));
  v1::TrainerReport report;
  if (!report.ParseFromString(body)) return absl::DataLossError("the trainer sent a frame that is not a TrainerReport");
  return report;
}

v1::Exited TrainerProcess::Wait() {
  siginfo_t info = {};
  // WNOWAIT first: the pid stays ours until the lock is held, so Kill never signals a stranger.
  while (waitid(P_PID, static_cast<id_t>(pid_.load()), &info, WEXITED | WNOWAIT) != 0 && errno == EINTR) {
  }
  std::lock_guard<std::mutex> lock(pid_mutex_);
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
  pid_ = 0;
  v1::Exited exited;
  if (WIFSIGNALED(status)) exited.set_signal(WTERMSIG(status));
  if (WIFEXITED(status)) exited.set_status(WEXITSTATUS(status));
  const absl::StatusOr<std::string> log = ReadFile(JoinPath(directory_, "stderr.log"));
  if (log.ok()) {
    std::vector<std::string> lines = absl::StrSplit(*log, '\n', absl::SkipWhitespace());
    if (lines.size() > 12) lines.erase(lines.begin(), lines.end() - 12);
    for (const std::string& line : lines) absl::StrAppend(exited.mutable_detail(), ValidUtf8(line.substr(0, 500)), "\n");
  }
  return exited;
}

void TrainerProcess::Kill(int signal) {
  std::lock_guard<std::mutex> lock(pid_mutex_);
  if (pid_ > 0) kill(pid_, signal);
}

bool TrainerProcess::stopped() {
  std::lock_guard<std::mutex> lock(pid_mutex_);
  if (pid_ <= 0) return false;
  const absl::StatusOr<std::string> stat = ReadFile(absl::StrCat("/proc/", pid_.load(), "/stat"));
  const size_t name_end = stat.ok() ? stat->rfind(')') : std::string::npos;
  if (name_end == std::string::npos || name_end + 2 >= stat->size()) return false;
  const char state = (*stat)[name_end + 2];
  return state == 'T' || state == 't';
}

}  // namespace ppft::agent
