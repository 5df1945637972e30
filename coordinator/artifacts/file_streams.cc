#include "coordinator/artifacts/file_streams.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"

namespace ppft::coordinator {

absl::StatusOr<FileRange> OpenBlobRange(const BlobStore& blobs, const std::string& sha256) {
  FileRange range;
  PPFT_ASSIGN_OR_RETURN(range.fd, blobs.OpenBlob(sha256));
  struct stat info;
  if (fstat(range.fd.get(), &info) != 0) return ErrnoStatus(errno, sha256);
  range.size_bytes = info.st_size;
  return range;
}

absl::Status SendRange(const FileRange& range, int64_t offset, grpc::ServerContext* context, grpc::ServerWriter<v1::FileChunk>* writer,
                       const CountBytes& count) {
  if (offset < 0 || offset > range.size_bytes)
    return absl::OutOfRangeError(absl::StrCat("offset ", offset, " is not in the file of ", range.size_bytes, " bytes"));
  v1::FileChunk chunk;
  for (int64_t at = offset; at < range.size_bytes;) {
    std::string* data = chunk.mutable_data();
    data->resize(static_cast<size_t>(std::min(range.size_bytes - at, kMaxChunkBytes)));
    const ssize_t got = pread(range.fd.get(), data->data(), data->size(), range.offset + at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EIO) return absl::DataLossError("the disk cannot read the file any more");
    if (got < 0) return ErrnoStatus(errno, "read");
    if (got == 0) return absl::DataLossError("the file became shorter since it was registered; register the model again");
    data->resize(static_cast<size_t>(got));
    chunk.set_offset(at);
    if (context->IsCancelled() || !writer->Write(chunk)) return absl::CancelledError("the client has gone");
    count("download", got);
    at += got;
  }
  return absl::OkStatus();
}

absl::Status Receive(BlobStore::Upload& upload, const std::function<absl::StatusOr<const std::string*>()>& next, const CountBytes& count) {
  while (!upload.complete()) {
    PPFT_ASSIGN_OR_RETURN(const std::string* data, next());
    if (data == nullptr) break;
    if (static_cast<int64_t>(data->size()) > kMaxChunkBytes)
      return absl::InvalidArgumentError(absl::StrCat("a chunk may have at most ", kMaxChunkBytes, " bytes"));
    PPFT_RETURN_IF_ERROR(upload.Append(*data));
    count("upload", static_cast<int64_t>(data->size()));
  }
  return upload.Commit();
}

absl::Status PutUploadedRow(JobStore& store, const BlobStore& blobs, const v1::FileRef& file) {
  if (!blobs.Touch(file.sha256())) return absl::AbortedError("the file has gone since it was found here: send it again");
  return store.PutBlob({file.sha256(), file.size_bytes(), absl::Now()});
}

}  // namespace ppft::coordinator
