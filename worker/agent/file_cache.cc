#include "worker/agent/file_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <tuple>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/sha256.h"
#include "common/base/status.h"

namespace ppft::agent {
namespace {
constexpr absl::string_view kPart = ".part";
}

FileCache::FileCache(std::string directory, int64_t limit_bytes, Download download)
    : directory_(std::move(directory)), limit_bytes_(limit_bytes), download_(std::move(download)) {}

absl::Status FileCache::Open() {
  PPFT_RETURN_IF_ERROR(MakeDirs(directory_));
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDir(directory_));
  for (const std::string& name : names) {
    const std::string path = JoinPath(directory_, name);
    if (!IsSha256Hex(name)) {
      PPFT_RETURN_IF_ERROR(RemoveAll(path));
      continue;
    }
    PPFT_ASSIGN_OR_RETURN(const int64_t size, FileSize(path));
    bytes_ += size;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> FileCache::LinkInto(const std::string& path, const std::string& sha256, const std::string& folder) {
  const std::string target = JoinPath(folder, sha256);
  if (link(path.c_str(), target.c_str()) != 0 && errno != EEXIST) return ErrnoStatus(errno, target);
  utimensat(AT_FDCWD, path.c_str(), nullptr, 0);  // marks the use; a failure only makes eviction less fair
  return target;
}

absl::StatusOr<std::string> FileCache::Fetch(const v1::FileRef& file, const std::string& folder, const std::function<bool()>& keep_going) {
  if (!IsSha256Hex(file.sha256())) return absl::InvalidArgumentError(absl::StrCat(file.name(), ": \"", file.sha256(), "\" is not a sha256"));
  const std::string path = JoinPath(directory_, file.sha256());
  {
    std::unique_lock<std::mutex> lock(mutex_);
    while (fetching_.count(file.sha256()) > 0) changed_.wait(lock);
    if (PathExists(path)) return LinkInto(path, file.sha256(), folder);
    fetching_.insert(file.sha256());
    Evict(file.size_bytes());
  }
  absl::Status status;
  std::chrono::milliseconds pause(100);
  int damaged = 0;
  while (keep_going()) {
    status = FetchOnce(file, path, /*check=*/damaged > 0);
    if (status.ok() || (absl::IsDataLoss(status) && ++damaged >= 3)) break;
    if (!absl::IsUnavailable(status) && !absl::IsDataLoss(status) && !absl::IsDeadlineExceeded(status)) break;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, pause);
    pause = std::min(pause * 2, std::chrono::milliseconds(2000));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  fetching_.erase(file.sha256());
  changed_.notify_all();
  if (!keep_going() && !PathExists(path)) return absl::CancelledError("no longer wanted");
  if (!status.ok()) return Annotate(status, absl::StrCat("fetching ", file.name()));
  bytes_ += file.size_bytes();
  return LinkInto(path, file.sha256(), folder);
}

absl::Status FileCache::FetchOnce(const v1::FileRef& file, const std::string& path, bool check) {
  const std::string part = absl::StrCat(path, kPart);
  {
    Fd fd(open(part.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (!fd) return ErrnoStatus(errno, part);
    PPFT_ASSIGN_OR_RETURN(const int64_t have, FileSize(part));
    if (have < file.size_bytes()) PPFT_RETURN_IF_ERROR(download_(file.sha256(), have, check, fd.get()));
  }
  PPFT_ASSIGN_OR_RETURN(const int64_t size, FileSize(part));
  PPFT_ASSIGN_OR_RETURN(const std::string sha256, Sha256File(part));
  if (size != file.size_bytes() || sha256 != file.sha256()) {
    PPFT_RETURN_IF_ERROR(RemoveAll(part));
    return absl::DataLossError(
        absl::StrCat(file.name(), ": got ", size, " bytes with sha256 ", sha256, ", expected ", file.size_bytes(), " with ", file.sha256()));
  }
  return RenameDurably(part, path);
}

void FileCache::Evict(int64_t needed) {
  if (bytes_ + needed <= limit_bytes_) return;
  const absl::StatusOr<std::vector<std::string>> names = ListDir(directory_);
  if (!names.ok()) return;  // the download reports what is wrong with the folder
  std::vector<std::tuple<int64_t, int64_t, std::string>> by_use;
  for (const std::string& name : *names) {
    struct stat info;
    const std::string path = JoinPath(directory_, name);
    // More than one link: a rank's folder holds it.
    if (absl::EndsWith(name, kPart) || stat(path.c_str(), &info) != 0 || info.st_nlink > 1) continue;
    by_use.emplace_back(info.st_mtim.tv_sec, info.st_size, path);
  }
  std::sort(by_use.begin(), by_use.end());
  for (const auto& [time, size, path] : by_use) {
    if (bytes_ + needed <= limit_bytes_) return;
    if (unlink(path.c_str()) == 0) bytes_ -= size;
  }
}

}  // namespace ppft::agent
