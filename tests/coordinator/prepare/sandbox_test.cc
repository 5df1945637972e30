#include "coordinator/prepare/sandbox.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"

namespace ppft::coordinator::prepare {
namespace {

// Runs `body` in a sandboxed child; true if it returned true.
bool InSandbox(const SandboxLimits& limits, const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    if (!EnterSandbox(limits).ok()) _exit(3);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_NE(WEXITSTATUS(status), 3) << "the sandbox was not entered";
  return WEXITSTATUS(status) == 0;
}

TEST(SandboxTest, NoSockets) {
  for (const int family : {AF_INET, AF_INET6, AF_UNIX, AF_NETLINK}) {
    EXPECT_TRUE(InSandbox(LimitsFor(0), [family] { return socket(family, SOCK_STREAM, 0) < 0 && errno == EPERM; })) << family;
  }
}

TEST(SandboxTest, NoProcessesAndNoPrograms) {
  EXPECT_TRUE(InSandbox(LimitsFor(0), [] { return fork() < 0 && errno == EPERM; }));
  EXPECT_TRUE(InSandbox(LimitsFor(0), [] { return execl("/bin/true", "true", nullptr) < 0 && errno == EPERM; }));
  EXPECT_TRUE(InSandbox(LimitsFor(0), [] { return std::system("true") != 0; }));
  EXPECT_TRUE(InSandbox(LimitsFor(0), [] { return kill(getppid(), 0) < 0 && errno == EPERM; }));
}

TEST(SandboxTest, ThreadsAndFilesStillWork) {
  EXPECT_TRUE(InSandbox(LimitsFor(0), [] {
    bool ran = false;
    std::thread([&] { ran = open("/proc/self/status", O_RDONLY) >= 0; }).join();
    return ran;
  }));
}

TEST(SandboxTest, MemoryAndFileSizeAreBounded) {
  SandboxLimits limits = LimitsFor(0);
  EXPECT_TRUE(InSandbox(limits, [] { return ::operator new (size_t{16} << 30, std::nothrow) == nullptr; }));
  limits.file_bytes = 1000;
  const std::string path = absl::StrCat(::testing::TempDir(), "/sandbox_file_", getpid());
  EXPECT_TRUE(InSandbox(limits, [&path] {
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    const std::string bytes(2000, 'x');
    return write(fd, bytes.data(), bytes.size()) == 1000 && write(fd, bytes.data(), 1) < 0 && errno == EFBIG;
  }));
  unlink(path.c_str());
}

TEST(SandboxTest, LimitsGrowWithTheInput) {
  const SandboxLimits small = LimitsFor(0);
  const SandboxLimits large = LimitsFor(int64_t{10} << 30);
  EXPECT_GT(large.memory_bytes, small.memory_bytes + (int64_t{10} << 30));
  EXPECT_GT(large.cpu_seconds, small.cpu_seconds);
  EXPECT_GT(large.file_bytes, small.file_bytes);
}

}  // namespace
}  // namespace ppft::coordinator::prepare
