#include "coordinator/prepare/sandbox.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/status.h"

namespace ppft::coordinator::prepare {
namespace {

#if defined(__x86_64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_AARCH64;
#else
constexpr uint32_t kArchitecture = 0;
#endif

// Answered with EPERM.
constexpr int kRefused[] = {SYS_socket,
                            SYS_socketpair,
                            SYS_connect,
                            SYS_bind,
                            SYS_listen,
                            SYS_accept4,
                            SYS_sendto,
                            SYS_execve,
                            SYS_execveat,
                            SYS_ptrace,
                            SYS_mount,
                            SYS_umount2,
                            SYS_keyctl,
                            SYS_bpf,
                            SYS_kill,
                            SYS_process_vm_readv,
                            SYS_process_vm_writev,
                            SYS_unshare,
                            SYS_setns,
#if defined(__x86_64__)
                            SYS_fork,
                            SYS_vfork
#endif
};

absl::Status Limit(int resource, int64_t value, const char* name) {
  rlimit limit;
  if (getrlimit(resource, &limit) != 0) return ErrnoStatus(errno, name);
  const rlim_t wanted = static_cast<rlim_t>(value);
  limit.rlim_cur = limit.rlim_max = limit.rlim_max == RLIM_INFINITY ? wanted : std::min(limit.rlim_max, wanted);
  if (setrlimit(resource, &limit) != 0) return ErrnoStatus(errno, name);
  return absl::OkStatus();
}

// Best effort on purpose: many hosts forbid namespaces, and the filter below already refuses sockets.
void LeaveNetwork() {
  if (unshare(CLONE_NEWNET) == 0) return;
  const uid_t uid = getuid();
  const gid_t gid = getgid();
  if (unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0) return;
  const auto write_line = [](const char* path, const std::string& line) {
    Fd fd(open(path, O_WRONLY | O_CLOEXEC));
    if (fd) (void)!write(fd.get(), line.data(), line.size());
  };
  write_line("/proc/self/setgroups", "deny");
  write_line("/proc/self/uid_map", absl::StrCat(uid, " ", uid, " 1"));
  write_line("/proc/self/gid_map", absl::StrCat(gid, " ", gid, " 1"));
}

absl::Status FilterSystemCalls() {
  if (kArchitecture == 0) return absl::OkStatus();
  std::vector<sock_filter> code;
  const auto load = [&](size_t offset) { code.push_back(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<uint32_t>(offset))); };
  const auto answer = [&](uint32_t value) { code.push_back(BPF_STMT(BPF_RET | BPF_K, value)); };
  const auto unless_equal_skip = [&](uint32_t value, uint8_t skip) { code.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)); };

  load(offsetof(seccomp_data, arch));
  code.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kArchitecture, 1, 0));
  answer(SECCOMP_RET_KILL_PROCESS);
  load(offsetof(seccomp_data, nr));
  for (const int number : kRefused) {
    unless_equal_skip(static_cast<uint32_t>(number), 1);
    answer(SECCOMP_RET_ERRNO | EPERM);
  }
  unless_equal_skip(SYS_clone3, 1);  // its flags cannot be seen from here; libc falls back to clone
  answer(SECCOMP_RET_ERRNO | ENOSYS);
  unless_equal_skip(SYS_clone, 3);  // threads only
  load(offsetof(seccomp_data, args));
  code.push_back(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 1, 0));
  answer(SECCOMP_RET_ERRNO | EPERM);
  answer(SECCOMP_RET_ALLOW);

  const sock_fprog program{static_cast<unsigned short>(code.size()), code.data()};
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) return ErrnoStatus(errno, "seccomp");
  return absl::OkStatus();
}

}  // namespace

SandboxLimits LimitsFor(int64_t input_bytes) {
  SandboxLimits limits;
  limits.memory_bytes = (int64_t{8} << 30) + 4 * input_bytes;
  limits.cpu_seconds = 600 + input_bytes / 20'000;
  limits.file_bytes = (int64_t{1} << 30) + 32 * input_bytes;
  return limits;
}

absl::Status EnterSandbox(const SandboxLimits& limits) {
  LeaveNetwork();
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return ErrnoStatus(errno, "no_new_privs");
  signal(SIGXFSZ, SIG_IGN);  // a write beyond the limit fails with EFBIG instead
  PPFT_RETURN_IF_ERROR(Limit(RLIMIT_CORE, 0, "RLIMIT_CORE"));
  PPFT_RETURN_IF_ERROR(Limit(RLIMIT_AS, limits.memory_bytes, "RLIMIT_AS"));
  PPFT_RETURN_IF_ERROR(Limit(RLIMIT_CPU, limits.cpu_seconds, "RLIMIT_CPU"));
  PPFT_RETURN_IF_ERROR(Limit(RLIMIT_FSIZE, limits.file_bytes, "RLIMIT_FSIZE"));
  PPFT_RETURN_IF_ERROR(Limit(RLIMIT_NOFILE, 64, "RLIMIT_NOFILE"));
  return FilterSystemCalls();
}

}  // namespace ppft::coordinator::prepare
