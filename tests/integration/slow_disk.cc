// LD_PRELOAD for the processes of a worker: a disk that is slow with one kind of file. Of each file whose path has SLOW_FILE in it the first SLOW_WRITES writes
// wait SLOW_MILLISECONDS each.
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

extern "C" ssize_t write(int fd, const void* data, size_t size) {
  static const char* const file = getenv("SLOW_FILE");
  static std::atomic<int> left = file == nullptr ? 0 : atoi(getenv("SLOW_WRITES"));
  if (left > 0) {
    char link[64] = "/proc/self/fd/", path[4096];
    char* at = link + strlen(link);
    unsigned value = static_cast<unsigned>(fd), digits = 1;
    for (unsigned rest = value / 10; rest > 0; rest /= 10) ++digits;
    for (unsigned i = digits; i > 0; --i, value /= 10) at[i - 1] = static_cast<char>('0' + value % 10);
    const ssize_t length = readlink(link, path, sizeof(path) - 1);
    path[length < 0 ? 0 : length] = '\0';
    if (strstr(path, file) != nullptr && left-- > 0) usleep(static_cast<useconds_t>(1000 * atoi(getenv("SLOW_MILLISECONDS"))));
  }
  return syscall(SYS_write, fd, data, size);
}
