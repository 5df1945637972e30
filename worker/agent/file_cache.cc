#include "worker/agent/file_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <map>
#include <thread>
#include <tuple>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/net/status.h"

namespace ppft::agent {
namespace {

constexpr absl::string_view kPart = ".part";
constexpr absl::string_view kUnverified = ".unverified";  // of an earlier boot
constexpr absl::string_view kBootFile = "boot";

}  // namespace

std::string BootId() {
  const absl::StatusOr<std::string> id = ReadFile("/proc/sys/kernel/random/boot_id", 100);
  return id.ok() ? std::string(absl::StripAsciiWhitespace(*id)) : "";
}

// A file that grows by downloads: what was received and its hash so far.
struct FileCache::Part {
  Fd fd;
  Sha256 sha;
  int64_t size_bytes = 0;

  // Goes on with what an earlier fetch left.
  absl::Status Open(const std::string& path);
  absl::Status Append(absl::string_view bytes, int64_t limit_bytes);
  absl::Status StartOver();
};

absl::Status FileCache::Part::Open(const std::string& path) {
  fd = Fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd) return ErrnoStatus(errno, path);
  std::string buffer(1 << 20, '\0');
  while (true) {
    const ssize_t got = read(fd.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path);
    if (got == 0) return absl::OkStatus();
    sha.Update(absl::string_view(buffer.data(), static_cast<size_t>(got)));
    size_bytes += got;
  }
}

absl::Status FileCache::Part::Append(absl::string_view bytes, int64_t limit_bytes) {
  if (static_cast<int64_t>(bytes.size()) > limit_bytes - size_bytes) return absl::DataLossError(absl::StrCat("more than its ", limit_bytes, " bytes came"));
  // A write that fails may have left some of its bytes: the next one goes over them.
  if (lseek(fd.get(), size_bytes, SEEK_SET) < 0) return ErrnoStatus(errno, "file cache");
  PPFT_RETURN_IF_ERROR(WriteAll(fd.get(), bytes, "file cache"));
  sha.Update(bytes);
  size_bytes += static_cast<int64_t>(bytes.size());
  return absl::OkStatus();
}

absl::Status FileCache::Part::StartOver() {
  sha = Sha256();
  size_bytes = 0;
  return ftruncate(fd.get(), 0) == 0 ? absl::OkStatus() : ErrnoStatus(errno, "file cache");
}

FileCache::FileCache(std::string directory, int64_t limit_bytes, int max_downloads, Download download)
    : directory_(std::move(directory)), limit_bytes_(limit_bytes), max_downloads_(std::max(1, max_downloads)), download_(std::move(download)) {}

absl::Status FileCache::Open(const std::string& boot_id) {
  boot_id_ = boot_id;
  PPFT_RETURN_IF_ERROR(MakeDirs(directory_));
  const std::string boot_path = JoinPath(directory_, kBootFile);
  const absl::StatusOr<std::string> last_boot = ReadFile(boot_path, 1000);
  const bool same_boot = last_boot.ok() && !boot_id.empty() && *last_boot == boot_id;
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDir(directory_));
  for (const std::string& name : names) {
    const std::string path = JoinPath(directory_, name);
    if (name == kBootFile) continue;
    if (!IsSha256Hex(absl::StripSuffix(name, kUnverified))) {
      PPFT_RETURN_IF_ERROR(RemoveAll(path));
      continue;
    }
    PPFT_ASSIGN_OR_RETURN(const int64_t size, FileSize(path));
    bytes_ += size;
    if (!same_boot && IsSha256Hex(name) && rename(path.c_str(), absl::StrCat(path, kUnverified).c_str()) != 0) return ErrnoStatus(errno, path);
  }
  return same_boot ? absl::OkStatus() : WriteFileAtomic(boot_path, boot_id);
}

absl::StatusOr<std::string> FileCache::LinkInto(const std::string& path, const std::string& sha256, const std::string& folder) {
  const std::string target = JoinPath(folder, sha256);
  if (link(path.c_str(), target.c_str()) != 0 && errno != EEXIST) return ErrnoStatus(errno, target);
  utimensat(AT_FDCWD, path.c_str(), nullptr, 0);  // marks the use; a failure only makes eviction less fair
  return target;
}

absl::StatusOr<std::string> FileCache::Fetch(const v1::FileRef& file, const std::string& folder, const std::function<bool()>& keep_going) {
  int64_t downloaded = 0;
  return FetchCounted(file, folder, keep_going, &downloaded);
}

absl::StatusOr<FileCache::Totals> FileCache::FetchAll(const std::vector<v1::FileRef>& files, const std::string& folder,
                                                      const std::function<bool()>& keep_going) {
  std::map<std::string, const v1::FileRef*> by_content;
  for (const v1::FileRef& file : files) by_content[file.sha256()] = &file;
  std::vector<const v1::FileRef*> order;
  Totals totals;
  for (const auto& [sha256, file] : by_content) {
    order.push_back(file);
    totals.files += 1;
    totals.bytes += file->size_bytes();
  }
  std::sort(order.begin(), order.end(), [](const v1::FileRef* a, const v1::FileRef* b) { return a->size_bytes() > b->size_bytes(); });
  std::atomic<size_t> next = 0;
  std::atomic<int64_t> downloaded = 0;
  std::atomic<bool> failed = false;
  std::mutex mutex;
  absl::Status first;  // guarded by mutex
  const auto fetch = [&] {
    for (size_t i = next++; i < order.size() && !failed; i = next++) {
      int64_t bytes = 0;
      const absl::Status status = FetchCounted(
                                      *order[i], folder, [&] { return !failed && keep_going(); }, &bytes)
                                      .status();
      downloaded += bytes;
      if (status.ok()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      if (!failed.exchange(true)) first = status;
    }
  };
  std::vector<std::thread> threads;
  const size_t num_threads = std::min(order.size(), static_cast<size_t>(max_downloads_));
  for (size_t i = 1; i < num_threads; ++i) threads.emplace_back(fetch);
  fetch();
  for (std::thread& thread : threads) thread.join();
  PPFT_RETURN_IF_ERROR(first);
  totals.downloaded_bytes = downloaded;
  return totals;
}

absl::StatusOr<std::string> FileCache::FetchCounted(const v1::FileRef& file, const std::string& folder, const std::function<bool()>& keep_going,
                                                    int64_t* downloaded) {
  if (!IsSha256Hex(file.sha256())) return absl::InvalidArgumentError(absl::StrCat(file.name(), ": \"", file.sha256(), "\" is not a sha256"));
  const std::string path = JoinPath(directory_, file.sha256());
  {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      const bool shared = fetching_.count(file.sha256()) > 0;
      if (!shared && PathExists(path)) return LinkInto(path, file.sha256(), folder);
      if (!shared && static_cast<int>(fetching_.size()) < max_downloads_) break;
      changed_.wait(lock);
    }
    fetching_.insert(file.sha256());
  }
  absl::Status status;
  if (!TakeOver(file, path)) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Evict(file.size_bytes());
      coming_bytes_ += file.size_bytes();
    }
    Part part;
    status = part.Open(absl::StrCat(path, kPart));
    if (absl::IsNotFound(status)) {
      status = MakeAgain();
      if (status.ok()) status = part.Open(absl::StrCat(path, kPart));
    }
    const int64_t had = part.size_bytes;
    std::chrono::milliseconds pause(100);
    int damaged = 0;
    bool again = status.ok();
    while (again && keep_going()) {
      status = FetchOnce(file, path, /*check=*/damaged > 0, part);
      again = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
              (absl::IsDataLoss(status) && ++damaged < 3 && net::GetErrorInfo(status).reason.empty());
      if (!again) break;
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait_for(lock, pause);
      pause = std::min(pause * 2, std::chrono::milliseconds(2000));
    }
    if (!keep_going() && !PathExists(path)) status = absl::CancelledError("no longer wanted");
    std::lock_guard<std::mutex> lock(mutex_);
    coming_bytes_ -= file.size_bytes();
    if (status.ok()) {
      *downloaded = part.size_bytes - had;
      bytes_ += file.size_bytes();
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  fetching_.erase(file.sha256());
  changed_.notify_all();
  if (!status.ok()) return Annotate(status, absl::StrCat("fetching ", file.name()));
  return LinkInto(path, file.sha256(), folder);
}

absl::Status FileCache::MakeAgain() {
  LogWarning(directory_, " is gone: it is made again");
  PPFT_RETURN_IF_ERROR(MakeDirs(directory_));
  std::lock_guard<std::mutex> lock(mutex_);
  bytes_ = 0;
  return WriteFileAtomic(JoinPath(directory_, kBootFile), boot_id_);
}

bool FileCache::TakeOver(const v1::FileRef& file, const std::string& path) {
  const std::string old = absl::StrCat(path, kUnverified);
  const absl::StatusOr<int64_t> size = FileSize(old);
  if (!size.ok()) return false;
  const absl::StatusOr<std::string> sha256 = Sha256File(old);
  if (sha256.ok() && *sha256 == file.sha256() && rename(old.c_str(), path.c_str()) == 0) return true;
  if (unlink(old.c_str()) == 0) bytes_ -= *size;
  return false;
}

absl::Status FileCache::FetchOnce(const v1::FileRef& file, const std::string& path, bool check, Part& part) {
  const auto append = [&](absl::string_view bytes) { return part.Append(bytes, file.size_bytes()); };
  absl::Status status;
  if (part.size_bytes < file.size_bytes()) status = download_(file.sha256(), part.size_bytes, check, append);
  if (status.ok()) {
    const int64_t size = part.size_bytes;
    const std::string sha256 = part.sha.HexDigest();
    if (size == file.size_bytes() && sha256 == file.sha256()) {
      return rename(absl::StrCat(path, kPart).c_str(), path.c_str()) == 0 ? absl::OkStatus() : ErrnoStatus(errno, path);
    }
    status = absl::DataLossError(
        absl::StrCat(file.name(), ": got ", size, " bytes with sha256 ", sha256, ", expected ", file.size_bytes(), " with ", file.sha256()));
  }
  if (absl::IsDataLoss(status)) PPFT_RETURN_IF_ERROR(part.StartOver());
  return status;
}

void FileCache::Evict(int64_t needed) {
  needed += coming_bytes_;
  if (bytes_ + needed <= limit_bytes_) return;
  const absl::StatusOr<std::vector<std::string>> names = ListDir(directory_);
  if (!names.ok()) return;  // the download reports what is wrong with the folder
  std::vector<std::tuple<int64_t, int64_t, std::string>> by_use;
  for (const std::string& name : *names) {
    struct stat info;
    const std::string path = JoinPath(directory_, name);
    const std::string sha256(absl::StripSuffix(name, kUnverified));
    // More than one link: a rank's folder holds it.
    if (!IsSha256Hex(sha256) || fetching_.count(sha256) > 0 || stat(path.c_str(), &info) != 0 || info.st_nlink > 1) continue;
    by_use.emplace_back(info.st_mtim.tv_sec, info.st_size, path);
  }
  std::sort(by_use.begin(), by_use.end());
  for (const auto& [time, size, path] : by_use) {
    if (bytes_ + needed <= limit_bytes_) return;
    if (unlink(path.c_str()) == 0) bytes_ -= size;
  }
}

}  // namespace ppft::agent
