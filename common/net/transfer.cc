#include "common/net/transfer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/net/channel.h"
#include "common/net/status.h"

namespace ppft::net {
namespace {

// Decides whether a cut transfer goes on: always after progress, otherwise until the patience is used up.
class Resumption {
 public:
  explicit Resumption(absl::Duration patience) : patience_(patience), since_(absl::Now()), backoff_(absl::Milliseconds(100), absl::Seconds(2)) {}

  bool Again(const absl::Status& status, bool progressed) {
    if (progressed) {
      since_ = absl::Now();
      backoff_.Reset();
    }
    if (!IsRetryable(status) || absl::Now() - since_ >= patience_) return false;
    absl::SleepFor(backoff_.Next());
    return true;
  }

 private:
  absl::Duration patience_;
  absl::Time since_;
  Backoff backoff_;
};

absl::StatusOr<v1::GetBlobResponse> GetBlob(v1::BlobService::StubInterface* stub, const std::string& sha256, const TransferOptions& options) {
  grpc::ClientContext context;
  SetDeadline(&context, options.call_timeout);
  v1::GetBlobRequest request;
  request.set_sha256(sha256);
  v1::GetBlobResponse response;
  PPFT_RETURN_IF_ERROR(StatusFromGrpc(stub->GetBlob(&context, request, &response)));
  return response;
}

// Sends [offset, end of file). `sent` grows with what was handed to the stream.
absl::Status SendFrom(v1::BlobService::StubInterface* stub, const std::string& path, const v1::FileRef& file, int64_t offset, const TransferOptions& options) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoStatus(errno, path);
  if (::lseek(fd.get(), offset, SEEK_SET) < 0) return ErrnoStatus(errno, path);
  grpc::ClientContext context;
  SetDeadline(&context, options.stream_timeout);
  v1::UploadBlobResponse response;
  auto stream = stub->UploadBlob(&context, &response);
  v1::UploadBlobRequest message;
  message.mutable_header()->set_sha256(file.sha256());
  message.mutable_header()->set_size_bytes(file.size_bytes());
  message.mutable_header()->set_offset(offset);
  bool open = stream->Write(message);
  std::string buffer(kChunkBytes, '\0');
  absl::Status read_error;
  int64_t at = offset;
  while (open && at < file.size_bytes()) {
    const ssize_t n = ::read(fd.get(), buffer.data(), std::min<int64_t>(kChunkBytes, file.size_bytes() - at));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      read_error = n < 0 ? ErrnoStatus(errno, path) : absl::FailedPreconditionError(absl::StrCat(path, ": became shorter while it was uploaded; start again"));
      context.TryCancel();
      break;
    }
    message.mutable_data()->assign(buffer.data(), static_cast<size_t>(n));
    open = stream->Write(message);
    at += n;
    if (open && options.progress) options.progress(at, file.size_bytes());
  }
  stream->WritesDone();
  const absl::Status status = StatusFromGrpc(stream->Finish());
  return read_error.ok() ? status : read_error;
}

absl::StatusOr<v1::FileRef> Describe(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return absl::InvalidArgumentError(absl::StrCat(path, ": is a folder, not a file"));
  v1::FileRef file;
  file.set_name(std::filesystem::path(path).filename().string());
  PPFT_ASSIGN_OR_RETURN(const int64_t size, FileSize(path));
  file.set_size_bytes(size);
  PPFT_ASSIGN_OR_RETURN(*file.mutable_sha256(), Sha256File(path));
  return file;
}

// Appends what the stream brings to the open .part file; `have` is its length before and after.
absl::Status Receive(const OpenDownload& open, const v1::FileRef& file, int fd, const std::string& part, int64_t* have, const TransferOptions& options) {
  grpc::ClientContext context;
  SetDeadline(&context, options.stream_timeout);
  auto stream = open(&context, *have);
  v1::FileChunk chunk;
  absl::Status local;
  while (local.ok() && stream->Read(&chunk)) {
    if (chunk.offset() != *have || *have + static_cast<int64_t>(chunk.data().size()) > file.size_bytes()) {
      local = absl::DataLossError(absl::StrCat(file.name(), ": the server sent bytes ", chunk.offset(), "+", chunk.data().size(), " where ", *have, " of ",
                                               file.size_bytes(), " were expected"));
    } else {
      local = WriteAll(fd, chunk.data(), part);
      if (local.ok()) *have += static_cast<int64_t>(chunk.data().size());
      if (local.ok() && options.progress) options.progress(*have, file.size_bytes());
    }
  }
  if (!local.ok()) context.TryCancel();
  const absl::Status status = StatusFromGrpc(stream->Finish());
  return local.ok() ? status : local;
}

// Fills PATH.part to its full length.
absl::Status Fill(const OpenDownload& open, const v1::FileRef& file, const std::string& part, const TransferOptions& options) {
  Fd fd(::open(part.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
  if (!fd) return ErrnoStatus(errno, part);
  PPFT_ASSIGN_OR_RETURN(int64_t have, FileSize(part));
  if (have > file.size_bytes()) {
    if (::ftruncate(fd.get(), 0) != 0) return ErrnoStatus(errno, part);
    have = 0;
  }
  if (::lseek(fd.get(), have, SEEK_SET) < 0) return ErrnoStatus(errno, part);
  if (options.progress) options.progress(have, file.size_bytes());
  Resumption resumption(options.patience);
  while (have < file.size_bytes()) {
    const int64_t before = have;
    absl::Status status = Receive(open, file, fd.get(), part, &have, options);
    if (have == file.size_bytes()) break;
    // A stream that ends early without an error was cut as well.
    if (status.ok()) status = absl::UnavailableError(absl::StrCat(file.name(), ": the stream ended at byte ", have, " of ", file.size_bytes()));
    if (!resumption.Again(status, have > before)) return status;
  }
  if (::fsync(fd.get()) != 0) return ErrnoStatus(errno, part);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<v1::FileRef> UploadFile(v1::BlobService::StubInterface* stub, const std::string& path, const TransferOptions& options) {
  PPFT_ASSIGN_OR_RETURN(const v1::FileRef file, Describe(path));
  Resumption resumption(options.patience);
  int64_t furthest = -1;
  for (bool damaged = false;;) {
    absl::Status status;
    const auto blob = GetBlob(stub, file.sha256(), options);
    if (blob.ok()) {
      if (blob->complete()) {
        if (options.progress) options.progress(file.size_bytes(), file.size_bytes());
        return file;
      }
      status = SendFrom(stub, path, file, std::min<int64_t>(blob->received_bytes(), file.size_bytes()), options);
      if (status.ok()) return file;
    } else {
      status = blob.status();
    }
    if (absl::IsDataLoss(status)) {
      PPFT_ASSIGN_OR_RETURN(const v1::FileRef now, Describe(path));
      if (now.sha256() != file.sha256()) return absl::FailedPreconditionError(absl::StrCat(path, ": changed while it was uploaded; start again"));
      if (damaged) return Annotate(status, path);
      damaged = true;
      continue;
    }
    const bool progressed = blob.ok() && blob->received_bytes() > furthest;
    if (blob.ok()) furthest = std::max(furthest, blob->received_bytes());
    if (!resumption.Again(status, progressed)) return Annotate(status, path);
  }
}

absl::Status DownloadFile(const OpenDownload& open, const v1::FileRef& file, const std::string& path, const TransferOptions& options) {
  if (!IsSha256Hex(file.sha256()) || file.size_bytes() < 0)
    return absl::DataLossError(absl::StrCat(file.name(), ": the manifest has no valid size and SHA-256"));
  if (PathExists(path)) {
    const auto digest = Sha256File(path);
    if (digest.ok() && *digest == file.sha256()) return absl::OkStatus();
  }
  const std::string part = path + ".part";
  for (int attempt = 0; attempt < 2; ++attempt) {
    const absl::Status filled = Fill(open, file, part, options);
    if (absl::IsDataLoss(filled) && attempt == 0) {
      PPFT_RETURN_IF_ERROR(RemoveAll(part));
      continue;
    }
    PPFT_RETURN_IF_ERROR(filled);
    PPFT_ASSIGN_OR_RETURN(const std::string digest, Sha256File(part));
    if (digest == file.sha256()) return RenameDurably(part, path);
    PPFT_RETURN_IF_ERROR(RemoveAll(part));
  }
  return absl::DataLossError(absl::StrCat(file.name(), ": arrived damaged twice (its SHA-256 is not ", file.sha256(), "); nothing was kept"));
}

}  // namespace ppft::net
