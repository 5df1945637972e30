// Files from the coordinator, on this host's disk, named by content: DIR/<sha256>. A file is there whole and verified, or not at all.
//
// Thread: any; two fetches of the same content share one download.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "ppft/v1/file.pb.h"

namespace ppft::agent {

class FileCache {
 public:
  // Appends the bytes from `offset` on to the open descriptor; may stop early with an error, the next call goes on where it stopped. `check`: other
  // content came before, the coordinator has to look whether its own is still right.
  using Download = std::function<absl::Status(const std::string& sha256, int64_t offset, bool check, int fd)>;

  // limit_bytes: the least recently used files go when a fetch would pass it; files in use never do.
  FileCache(std::string directory, int64_t limit_bytes, Download download);

  // Removes what an interrupted download left and counts what is there.
  absl::Status Open();
  // Links the verified content into `folder` (same file system) as its sha256 and returns that path; the link keeps it from eviction. Retries
  // UNAVAILABLE and damaged downloads until `keep_going` is false (then CANCELLED).
  absl::StatusOr<std::string> Fetch(const v1::FileRef& file, const std::string& folder, const std::function<bool()>& keep_going);
  int64_t bytes() const { return bytes_; }

 private:
  absl::StatusOr<std::string> LinkInto(const std::string& path, const std::string& sha256, const std::string& folder);
  absl::Status FetchOnce(const v1::FileRef& file, const std::string& path, bool check);
  void Evict(int64_t needed);

  const std::string directory_;
  const int64_t limit_bytes_;
  const Download download_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<std::string> fetching_;  // guarded by mutex_
  std::atomic<int64_t> bytes_ = 0;
};

}  // namespace ppft::agent
