// Files from the coordinator, on this host's disk, named by content: DIR/<sha256>. A file is there whole and verified, or not at all.
//
// Nothing is synced: a process that dies leaves its finished writes to the kernel, and after a crash of the host, which may lose any of them, every
// file is hashed again before its first use. DIR/boot says which boot of the host the verified files were made in.
// Thread: any; two fetches of the same content share one download.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ppft/v1/file.pb.h"

namespace ppft::agent {

// The kernel's word for this boot of the host; "" if there is none.
std::string BootId();

class FileCache {
 public:
  // Takes the next bytes of a file; an error ends the download.
  using Sink = std::function<absl::Status(absl::string_view bytes)>;
  // Gives the bytes from `offset` on to the sink; may stop early with an error, the next call goes on where it stopped. `check`: other content came
  // before, the coordinator has to look whether its own is still right: if not, DATA_LOSS with an ErrorInfo. Called by several threads at once.
  using Download = std::function<absl::Status(const std::string& sha256, int64_t offset, bool check, const Sink& sink)>;

  struct Totals {
    int64_t files = 0;  // of different content
    int64_t bytes = 0;
    int64_t downloaded_bytes = 0;
  };

  // limit_bytes: the least recently used files go when a fetch would pass it; files in use never do. At most max_downloads at once.
  FileCache(std::string directory, int64_t limit_bytes, int max_downloads, Download download);

  // Removes what an interrupted download left and counts what is there.
  absl::Status Open(const std::string& boot_id);
  // Links the verified content into `folder` (same file system) as its sha256 and returns that path; the link keeps it from eviction. Retries
  // UNAVAILABLE and damaged downloads until `keep_going` is false (then CANCELLED).
  absl::StatusOr<std::string> Fetch(const v1::FileRef& file, const std::string& folder, const std::function<bool()>& keep_going);
  // Fetches all of them, several at once, the largest first. The first error ends it.
  absl::StatusOr<Totals> FetchAll(const std::vector<v1::FileRef>& files, const std::string& folder, const std::function<bool()>& keep_going);
  int64_t bytes() const { return bytes_; }

 private:
  struct Part;

  absl::StatusOr<std::string> FetchCounted(const v1::FileRef& file, const std::string& folder, const std::function<bool()>& keep_going, int64_t* downloaded);
  absl::StatusOr<std::string> LinkInto(const std::string& path, const std::string& sha256, const std::string& folder);
  // Somebody deleted the folder under this process.
  absl::Status MakeAgain();
  // Of an earlier boot: true if it is still what its name says; gone if not.
  bool TakeOver(const v1::FileRef& file, const std::string& path);
  absl::Status FetchOnce(const v1::FileRef& file, const std::string& path, bool check, Part& part);
  // With mutex_ held.
  void Evict(int64_t needed);

  const std::string directory_;
  const int64_t limit_bytes_;
  const int max_downloads_;
  const Download download_;
  std::string boot_id_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<std::string> fetching_;  // guarded by mutex_: contents
  int64_t coming_bytes_ = 0;        // guarded by mutex_: of the files that are being downloaded
  std::atomic<int64_t> bytes_ = 0;
};

}  // namespace ppft::agent
