// BlobStore: immutable files on disk, named by the SHA-256 of their bytes. EDGE for everything under DATA_DIR/{blobs,partial,tmp,damaged}.
//
// A blob lies at blobs/ab/abcdef…, mode 0400, and is complete: bytes are collected in partial/ (an upload that was cut goes on there) or tmp/,
// synced, checked, and only then renamed. After a power cut a partial file may hold anything; the final check finds that.
// Thread-safe. Knows nothing of the database: a row may name a blob only after it lies here.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "ppft/v1/file.pb.h"

namespace ppft::coordinator {

constexpr int64_t kMaxBlobBytes = int64_t{1} << 40;
constexpr int64_t kMaxChunkBytes = 1 << 20;

class BlobStore {
 public:
  // Bytes of the disk that uploads leave free, for the database; never more than a sixteenth of the disk.
  static constexpr int64_t kReserveBytes = 64 << 20;

  // Creates the folders and empties tmp/.
  static absl::StatusOr<std::unique_ptr<BlobStore>> Open(const std::string& data_dir, int64_t reserve_bytes = kReserveBytes);

  // Size of a complete blob.
  std::optional<int64_t> Find(const std::string& sha256) const;
  std::string PathOf(const std::string& sha256) const;
  // NOT_FOUND if there is no such blob; UNAVAILABLE if the folders of all blobs are not there, as when a disk is not mounted.
  absl::StatusOr<Fd> OpenBlob(const std::string& sha256) const;
  absl::StatusOr<std::string> Read(const std::string& sha256, int64_t max_bytes) const;

  // Bytes that a partial upload under this key has. The key is the content's sha256, with a prefix for writers that must not share.
  int64_t ReceivedBytes(const std::string& key) const;

  class Upload;
  // Goes on at `offset`, which must not be above ReceivedBytes(key): bytes after it are dropped. ABORTED if another upload of the key runs;
  // RESOURCE_EXHAUSTED if the disk has no room; OUT_OF_RANGE for an offset that is not there; INVALID_ARGUMENT for a bad name or size.
  absl::StatusOr<std::unique_ptr<Upload>> StartUpload(const std::string& key, const std::string& sha256, int64_t size_bytes, int64_t offset);

  // A new empty folder under tmp/; whoever asks removes it.
  absl::StatusOr<std::string> MakeTemporaryDir(absl::string_view purpose);
  // Takes a complete file of our own making from a temporary folder (it is moved). Hashes it.
  absl::StatusOr<v1::FileRef> AddFile(const std::string& path, absl::string_view name);
  absl::StatusOr<v1::FileRef> AddBytes(absl::string_view bytes, absl::string_view name);

  // A missing blob is fine.
  absl::Status Delete(const std::string& sha256);
  // Hashes the blob. DATA_LOSS if it is damaged, or cannot be read: it then lies in damaged/ for a week, and its name is free for the right bytes;
  // DATA_LOSS as well while it lies there alone; otherwise the errors of OpenBlob.
  absl::Status Verify(const std::string& sha256) const;

  // For the sweep. A blob is as old as its last use by an upload or by AddFile: it is made young when it is published or found there.
  absl::StatusOr<std::vector<std::string>> ListOlderThan(absl::Time time) const;
  bool IsOlderThan(const std::string& sha256, absl::Time time) const;
  // A blob that somebody is about to name. False if it is not there.
  bool Touch(const std::string& sha256) const;
  // When this process opened the store, by the file system's clock.
  absl::Time open_time() const { return open_time_; }
  // Partial uploads that nobody continued for a week, and what Verify put aside as long ago.
  void DropOldPartials() const;
  // Of an upload that nobody will continue.
  void DropPartial(const std::string& key) const;

  const std::string& data_dir() const { return data_dir_; }
  // Free bytes for ordinary use on the disk.
  int64_t FreeBytes() const;
  int64_t reserve_bytes() const { return reserve_bytes_; }

 private:
  BlobStore(std::string data_dir, int64_t reserve_bytes) : data_dir_(std::move(data_dir)), reserve_bytes_(reserve_bytes) {}
  std::string PartialPath(const std::string& key) const;
  // Moves a synced file to its place.
  absl::Status Publish(const std::string& path, const std::string& sha256);
  absl::Status NoRoom(int64_t needed_bytes, int64_t received_bytes) const;

  const std::string data_dir_;
  const int64_t reserve_bytes_;
  absl::Time open_time_;
  absl::Mutex mutex_;
  std::set<std::string> uploading_ ABSL_GUARDED_BY(mutex_);  // keys
  int64_t next_temporary_ ABSL_GUARDED_BY(mutex_) = 0;
};

// One running upload; used by one thread. Destroyed without Commit it keeps what was received.
class BlobStore::Upload {
 public:
  ~Upload();
  // The blob is already there: nothing needs to be sent.
  bool complete() const { return complete_; }
  int64_t received_bytes() const { return received_; }
  // RESOURCE_EXHAUSTED: the disk is full, what was received stays.
  absl::Status Append(absl::string_view bytes);
  // Checks size and sha256 and publishes the blob. ABORTED if bytes are missing (they stay); DATA_LOSS if the content is not what its name says
  // (nothing stays).
  absl::Status Commit();

 private:
  friend class BlobStore;
  Upload(BlobStore* store, std::string key, std::string sha256, int64_t size_bytes)
      : store_(store), key_(std::move(key)), sha256_(std::move(sha256)), size_(size_bytes) {}

  BlobStore* const store_;
  const std::string key_;
  const std::string sha256_;
  const int64_t size_;
  bool complete_ = false;
  bool locked_ = false;
  int64_t received_ = 0;
  Fd fd_;
  Sha256 sha_;  // of the received bytes
};

}  // namespace ppft::coordinator
