#include "coordinator/artifacts/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/files.h"
#include "common/base/status.h"

namespace ppft::coordinator {
namespace {

constexpr size_t kErrorTailBytes = 8 << 10;
constexpr int kPollMilliseconds = 100;

struct Pipe {
  Fd read, write;
};

absl::StatusOr<Pipe> MakePipe() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  return Pipe{Fd(ends[0]), Fd(ends[1])};
}

void SetLimit(__rlimit_resource what, int64_t value) {
  const rlimit limit{static_cast<rlim_t>(value), static_cast<rlim_t>(value)};
  setrlimit(what, &limit);  // a tighter limit that is already set stays
}

// Between fork and exec: calls that are safe there alone.
[[noreturn]] void Exec(char* const* argv, const Pipe& out, const Pipe& err, int null_fd, const ChildLimits& limits, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);  // the parent died before the line above
  if (dup2(null_fd, 0) < 0 || dup2(out.write.get(), 1) < 0 || dup2(err.write.get(), 2) < 0) _exit(127);
  setpgid(0, 0);
  SetLimit(RLIMIT_CORE, 0);
  SetLimit(RLIMIT_AS, limits.max_memory_bytes);
  SetLimit(RLIMIT_FSIZE, limits.max_file_bytes);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execv(argv[0], argv);
  _exit(127);
}

// Appends what is there; closes the descriptor at the end of the stream.
void Drain(Fd& fd, std::string& out) {
  char buffer[1 << 16];
  const ssize_t got = read(fd.get(), buffer, sizeof(buffer));
  if (got > 0) {
    out.append(buffer, static_cast<size_t>(got));
  } else if (got == 0 || errno != EINTR) {
    fd.reset();
  }
}

// Collects output until the child has closed both ends.
absl::Status Collect(Fd& out, Fd& err, const ChildLimits& limits, const std::function<bool()>& cancelled, ChildResult* result) {
  const absl::Time deadline = absl::Now() + limits.timeout;
  while (out || err) {
    if (cancelled && cancelled()) return absl::CancelledError("no longer wanted");
    if (absl::Now() > deadline) return absl::DeadlineExceededError(absl::StrCat("it took longer than ", absl::FormatDuration(limits.timeout)));
    pollfd polls[2] = {{out ? out.get() : -1, POLLIN, 0}, {err ? err.get() : -1, POLLIN, 0}};
    if (poll(polls, 2, kPollMilliseconds) < 0 && errno != EINTR) return ErrnoStatus(errno, "poll");
    if (polls[0].revents != 0) Drain(out, result->output);
    if (polls[1].revents != 0) Drain(err, result->errors);
    if (result->errors.size() > 2 * kErrorTailBytes) result->errors.erase(0, result->errors.size() - kErrorTailBytes);
    if (result->output.size() > limits.max_output_bytes)
      return absl::ResourceExhaustedError(absl::StrCat("it printed more than ", limits.max_output_bytes, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ChildResult> RunChild(const std::vector<std::string>& arguments, const ChildLimits& limits, const std::function<bool()>& cancelled) {
  if (access(arguments[0].c_str(), X_OK) != 0)
    return absl::NotFoundError(absl::StrCat("the program ", arguments[0], " is missing; build it or repair the installation"));
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  PPFT_ASSIGN_OR_RETURN(Pipe out, MakePipe());
  PPFT_ASSIGN_OR_RETURN(Pipe err, MakePipe());
  Fd null_fd(open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (!null_fd) return ErrnoStatus(errno, "/dev/null");
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child < 0) return ErrnoStatus(errno, "fork");
  if (child == 0) Exec(argv.data(), out, err, null_fd.get(), limits, parent);
  out.write.reset();
  err.write.reset();

  ChildResult result;
  const absl::Status status = Collect(out.read, err.read, limits, cancelled, &result);
  if (!status.ok()) {
    kill(-child, SIGKILL);  // its group, once it has one
    kill(child, SIGKILL);
  }
  int state = 0;
  while (waitpid(child, &state, 0) < 0 && errno == EINTR) {
  }
  if (!status.ok()) return Annotate(status, arguments[0].substr(arguments[0].rfind('/') + 1));
  if (WIFSIGNALED(state)) result.signal = WTERMSIG(state);
  if (WIFEXITED(state)) result.status = WEXITSTATUS(state);
  if (result.errors.size() > kErrorTailBytes) result.errors.erase(0, result.errors.size() - kErrorTailBytes);
  return result;
}

}  // namespace ppft::coordinator
