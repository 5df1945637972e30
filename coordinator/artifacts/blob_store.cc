#include "coordinator/artifacts/blob_store.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status.h"

namespace ppft::coordinator {
namespace {

constexpr time_t kPartialLifetimeSeconds = 7 * 24 * 3600;

bool IsDiskFull(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

absl::Status HashPrefix(int fd, int64_t size, Sha256* sha) {
  std::string buffer(1 << 20, '\0');
  int64_t at = 0;
  while (at < size) {
    const ssize_t got = pread(fd, buffer.data(), static_cast<size_t>(std::min<int64_t>(size - at, static_cast<int64_t>(buffer.size()))), at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, "read");
    if (got == 0) return absl::DataLossError("it became shorter");
    sha->Update(absl::string_view(buffer.data(), static_cast<size_t>(got)));
    at += got;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<BlobStore>> BlobStore::Open(const std::string& data_dir, int64_t reserve_bytes) {
  // A file-size limit must be an error of write(2), not the end of the coordinator.
  signal(SIGXFSZ, SIG_IGN);
  struct statvfs disk;
  if (statvfs(data_dir.c_str(), &disk) == 0) reserve_bytes = std::min(reserve_bytes, static_cast<int64_t>(disk.f_blocks / 16 * disk.f_frsize));
  std::unique_ptr<BlobStore> store(new BlobStore(data_dir, reserve_bytes));
  PPFT_RETURN_IF_ERROR(RemoveAll(JoinPath(data_dir, "tmp")));
  for (const char* folder : {"blobs", "partial", "tmp", "damaged"}) PPFT_RETURN_IF_ERROR(MakeDirs(JoinPath(data_dir, folder)));
  for (int i = 0; i < 256; ++i) {
    const std::string folder = JoinPath(data_dir, absl::StrFormat("blobs/%02x", i));
    if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) return ErrnoStatus(errno, folder);
  }
  PPFT_RETURN_IF_ERROR(SyncPath(JoinPath(data_dir, "blobs")));
  PPFT_RETURN_IF_ERROR(SyncPath(data_dir));
  struct stat tmp;  // made above: its time is now
  if (stat(JoinPath(data_dir, "tmp").c_str(), &tmp) != 0) return ErrnoStatus(errno, JoinPath(data_dir, "tmp"));
  store->open_time_ = absl::TimeFromTimespec(tmp.st_mtim);
  return store;
}

void BlobStore::DropOldPartials() const {
  for (const char* folder : {"partial", "damaged"}) {
    const auto names = ListDir(JoinPath(data_dir_, folder));
    if (!names.ok()) continue;
    for (const std::string& name : *names) {
      const std::string path = JoinPath(JoinPath(data_dir_, folder), name);
      struct stat info;
      // Best effort: the next start tries again.
      if (stat(path.c_str(), &info) == 0 && info.st_mtime + kPartialLifetimeSeconds < std::time(nullptr)) unlink(path.c_str());
    }
  }
}

void BlobStore::DropPartial(const std::string& key) const { unlink(PartialPath(key).c_str()); }  // best effort: the next start tries again

absl::StatusOr<std::vector<std::string>> BlobStore::ListOlderThan(absl::Time time) const {
  std::vector<std::string> old;
  for (int i = 0; i < 256; ++i) {
    PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDir(JoinPath(data_dir_, absl::StrFormat("blobs/%02x", i))));
    for (const std::string& name : names) {
      if (IsSha256Hex(name) && IsOlderThan(name, time)) old.push_back(name);
    }
  }
  return old;
}

bool BlobStore::IsOlderThan(const std::string& sha256, absl::Time time) const {
  struct stat info;
  return stat(PathOf(sha256).c_str(), &info) == 0 && S_ISREG(info.st_mode) && absl::TimeFromTimespec(info.st_mtim) < time;
}

bool BlobStore::Touch(const std::string& sha256) const { return IsSha256Hex(sha256) && utimensat(AT_FDCWD, PathOf(sha256).c_str(), nullptr, 0) == 0; }

std::optional<int64_t> BlobStore::Find(const std::string& sha256) const {
  if (!IsSha256Hex(sha256)) return std::nullopt;
  struct stat info;
  if (stat(PathOf(sha256).c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return std::nullopt;
  return static_cast<int64_t>(info.st_size);
}

std::string BlobStore::PathOf(const std::string& sha256) const { return JoinPath(data_dir_, absl::StrCat("blobs/", sha256.substr(0, 2), "/", sha256)); }

std::string BlobStore::PartialPath(const std::string& key) const { return JoinPath(data_dir_, absl::StrCat("partial/", key)); }

absl::StatusOr<Fd> BlobStore::OpenBlob(const std::string& sha256) const {
  if (!IsSha256Hex(sha256)) return absl::InvalidArgumentError("sha256 must be 64 lower-case hex digits");
  Fd fd(open(PathOf(sha256).c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd && errno == ENOENT) {
    const std::string folder = JoinPath(data_dir_, absl::StrCat("blobs/", sha256.substr(0, 2)));
    if (!PathExists(folder)) return absl::UnavailableError(absl::StrCat(folder, " is not there: is the disk of --data_dir mounted?"));
    return absl::NotFoundError(absl::StrCat("no file with the content ", sha256, " in ", folder));
  }
  if (!fd) return ErrnoStatus(errno, PathOf(sha256));
  return fd;
}

absl::StatusOr<std::string> BlobStore::Read(const std::string& sha256, int64_t max_bytes) const {
  if (!Find(sha256)) return absl::NotFoundError(absl::StrCat("no file with the content ", sha256));
  PPFT_ASSIGN_OR_RETURN(std::string bytes, ReadFile(PathOf(sha256), max_bytes));
  if (Sha256Hex(bytes) != sha256) return absl::DataLossError(absl::StrCat(PathOf(sha256), ": the content is damaged"));
  return bytes;
}

int64_t BlobStore::ReceivedBytes(const std::string& key) const {
  const auto size = FileSize(PartialPath(key));
  return size.ok() ? *size : 0;
}

int64_t BlobStore::FreeBytes() const {
  struct statvfs info;
  if (statvfs(data_dir_.c_str(), &info) != 0) return 0;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

absl::Status BlobStore::NoRoom(int64_t needed_bytes, int64_t received_bytes) const {
  return absl::ResourceExhaustedError(absl::StrCat("the coordinator's disk is full: ", data_dir_, " has ", FreeBytes(), " bytes free, ", needed_bytes,
                                                   " more are needed (", reserve_bytes_, " stay reserved); free space there and try again: the ",
                                                   received_bytes, " bytes received so far are kept"));
}

absl::StatusOr<std::unique_ptr<BlobStore::Upload>> BlobStore::StartUpload(const std::string& key, const std::string& sha256, int64_t size_bytes,
                                                                          int64_t offset) {
  if (!IsSha256Hex(sha256)) return absl::InvalidArgumentError("sha256 must be 64 lower-case hex digits");
  if (size_bytes < 0 || size_bytes > kMaxBlobBytes)
    return absl::InvalidArgumentError(absl::StrCat("size_bytes (", size_bytes, ") must be from 0 to ", kMaxBlobBytes));
  if (key.empty() || key[0] == '.' || key.find('/') != std::string::npos || key.find('\0') != std::string::npos || key.size() > 250) {
    return absl::InvalidArgumentError("bad name of an upload");
  }
  std::unique_ptr<Upload> upload(new Upload(this, key, sha256, size_bytes));
  if (const std::optional<int64_t> there = Find(sha256)) {
    if (*there != size_bytes) return absl::InvalidArgumentError(absl::StrCat("the content ", sha256, " has ", *there, " bytes, not ", size_bytes));
    Touch(sha256);
    upload->complete_ = true;
    upload->received_ = size_bytes;
    return upload;
  }
  {
    absl::MutexLock lock(&mutex_);
    if (!uploading_.insert(key).second) return absl::AbortedError("another upload of the same content is running; try again when it has ended");
  }
  upload->locked_ = true;
  const int64_t received = ReceivedBytes(key);
  if (offset < 0 || offset > received || offset > size_bytes) {
    return absl::OutOfRangeError(absl::StrCat("the upload goes on at byte ", std::min(received, size_bytes), ", not at ", offset));
  }
  if (size_bytes - offset > FreeBytes() - reserve_bytes_) return NoRoom(size_bytes - offset, received);
  upload->fd_ = Fd(open(PartialPath(key).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!upload->fd_) return IsDiskFull(errno) ? NoRoom(size_bytes, 0) : ErrnoStatus(errno, PartialPath(key));
  if (ftruncate(upload->fd_.get(), offset) != 0) return ErrnoStatus(errno, PartialPath(key));
  PPFT_RETURN_IF_ERROR(HashPrefix(upload->fd_.get(), offset, &upload->sha_));
  if (lseek(upload->fd_.get(), offset, SEEK_SET) < 0) return ErrnoStatus(errno, PartialPath(key));
  upload->received_ = offset;
  return upload;
}

BlobStore::Upload::~Upload() {
  if (!locked_) return;
  absl::MutexLock lock(&store_->mutex_);
  store_->uploading_.erase(key_);
}

absl::Status BlobStore::Upload::Append(absl::string_view bytes) {
  if (complete_) return absl::OkStatus();
  if (static_cast<int64_t>(bytes.size()) > size_ - received_) {
    return absl::InvalidArgumentError(absl::StrCat("more bytes were sent than the ", size_, " that were announced"));
  }
  while (!bytes.empty()) {
    const ssize_t put = write(fd_.get(), bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && IsDiskFull(errno)) return store_->NoRoom(size_ - received_, received_);
    if (put < 0) return ErrnoStatus(errno, store_->PartialPath(key_));
    sha_.Update(bytes.substr(0, static_cast<size_t>(put)));
    received_ += put;
    bytes.remove_prefix(static_cast<size_t>(put));
  }
  return absl::OkStatus();
}

absl::Status BlobStore::Upload::Commit() {
  if (complete_) return absl::OkStatus();
  if (received_ < size_) return absl::AbortedError(absl::StrCat("the upload ended at byte ", received_, " of ", size_, "; go on there"));
  const std::string path = store_->PartialPath(key_);
  if (sha_.HexDigest() != sha256_) {
    unlink(path.c_str());
    return absl::DataLossError(absl::StrCat("the uploaded bytes do not have the announced sha256 ", sha256_, "; nothing was kept, upload the file again"));
  }
  if (fsync(fd_.get()) != 0) return IsDiskFull(errno) ? store_->NoRoom(0, received_) : ErrnoStatus(errno, path);
  PPFT_RETURN_IF_ERROR(store_->Publish(path, sha256_));
  complete_ = true;
  return absl::OkStatus();
}

absl::Status BlobStore::Publish(const std::string& path, const std::string& sha256) {
  if (utimensat(AT_FDCWD, path.c_str(), nullptr, 0) != 0 || chmod(path.c_str(), 0400) != 0) return ErrnoStatus(errno, path);
  return RenameDurably(path, PathOf(sha256));
}

absl::Status BlobStore::Verify(const std::string& sha256) const {
  const std::string path = PathOf(sha256);
  const std::string aside = JoinPath(data_dir_, absl::StrCat("damaged/", sha256));
  const absl::StatusOr<Fd> fd = OpenBlob(sha256);
  if (absl::IsNotFound(fd.status()) && PathExists(aside)) return absl::DataLossError(absl::StrCat(path, " was found damaged and now lies at ", aside));
  PPFT_RETURN_IF_ERROR(fd.status());
  struct stat info;
  if (fstat(fd->get(), &info) != 0) return ErrnoStatus(errno, path);
  Sha256 sha;
  const absl::Status read = HashPrefix(fd->get(), info.st_size, &sha);
  const std::string found = read.ok() ? sha.HexDigest() : "";
  if (found == sha256) return absl::OkStatus();
  Touch(sha256);                                                                                     // its week begins now
  if (rename(path.c_str(), aside.c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, path);  // another call may have found it, too
  return absl::DataLossError(
      absl::StrCat(path, " is damaged, ", read.ok() ? absl::StrCat("it has the sha256 ", found) : std::string(read.message()), "; it now lies at ", aside));
}

absl::StatusOr<std::string> BlobStore::MakeTemporaryDir(absl::string_view purpose) {
  int64_t number = 0;
  {
    absl::MutexLock lock(&mutex_);
    number = ++next_temporary_;
  }
  const std::string path = JoinPath(data_dir_, absl::StrCat("tmp/", purpose, "-", number));
  PPFT_RETURN_IF_ERROR(MakeDirs(path));
  return path;
}

absl::StatusOr<v1::FileRef> BlobStore::AddFile(const std::string& path, absl::string_view name) {
  v1::FileRef file;
  file.set_name(std::string(name));
  PPFT_ASSIGN_OR_RETURN(const int64_t size, FileSize(path));
  PPFT_ASSIGN_OR_RETURN(const std::string sha256, Sha256File(path));
  file.set_size_bytes(size);
  file.set_sha256(sha256);
  if (Touch(sha256)) {
    unlink(path.c_str());  // the same content is there; the temporary folder goes anyway
    return file;
  }
  PPFT_RETURN_IF_ERROR(SyncPath(path));
  PPFT_RETURN_IF_ERROR(Publish(path, sha256));
  return file;
}

absl::StatusOr<v1::FileRef> BlobStore::AddBytes(absl::string_view bytes, absl::string_view name) {
  PPFT_ASSIGN_OR_RETURN(const std::string folder, MakeTemporaryDir("bytes"));
  absl::Status status = WriteFileAtomic(JoinPath(folder, "file"), bytes);
  absl::StatusOr<v1::FileRef> file = status.ok() ? AddFile(JoinPath(folder, "file"), name) : absl::StatusOr<v1::FileRef>(status);
  PPFT_RETURN_IF_ERROR(RemoveAll(folder));
  return file;
}

absl::Status BlobStore::Delete(const std::string& sha256) {
  if (!IsSha256Hex(sha256)) return absl::InvalidArgumentError("sha256 must be 64 lower-case hex digits");
  if (unlink(PathOf(sha256).c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, PathOf(sha256));
  return absl::OkStatus();
}

}  // namespace ppft::coordinator
