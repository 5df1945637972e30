// Files the careful way: whole reads, atomic durable replacement, directories. EDGE; any thread; blocks. Errors: ErrnoStatus with the path, and those named.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft {

// An owned file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept;
  ~Fd() { reset(); }
  int get() const { return fd_; }
  int release();
  void reset();
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes = int64_t{1} << 32);  // INVALID_ARGUMENT: a folder, or more bytes
// Exactly [offset, offset + size) of an open file into `out`; DATA_LOSS if the file ends before that. `what` begins the message.
absl::Status ReadAt(int fd, char* out, int64_t size, int64_t offset, absl::string_view what);
absl::StatusOr<int64_t> FileSize(const std::string& path);
bool PathExists(const std::string& path);  // false also where it cannot be looked at

// Temporary file beside it, write, fsync, rename, fsync of the folder. After an error the old file is untouched, but for one of the last fsync.
absl::Status WriteFileAtomic(const std::string& path, absl::string_view content);
// fsync of a file or folder.
absl::Status SyncPath(const std::string& path);
// rename + fsync of the target's folder; both on one file system. After an error of the fsync the new name may not outlive a crash.
absl::Status RenameDurably(const std::string& from, const std::string& to);
absl::Status WriteAll(int fd, absl::string_view bytes, absl::string_view what);  // after an error some of it may be written

absl::Status MakeDirs(const std::string& path);                             // mkdir -p, mode 0700; FAILED_PRECONDITION: not a folder
absl::Status RemoveAll(const std::string& path);                            // rm -rf; a missing path is fine
absl::StatusOr<std::vector<std::string>> ListDir(const std::string& path);  // names, sorted
std::string JoinPath(absl::string_view a, absl::string_view b);

// A read-only mapping of a whole regular file (INVALID_ARGUMENT for others); stays valid after the file is unlinked.
class MappedFile {
 public:
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  absl::string_view bytes() const { return absl::string_view(static_cast<const char*>(data_), size_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ppft
