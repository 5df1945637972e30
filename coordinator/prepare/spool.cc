#include "coordinator/prepare/spool.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/data/token_file.h"

namespace ppft::coordinator::prepare {
namespace {

constexpr size_t kPieceBytes = size_t{1} << 20;

absl::StatusOr<Fd> Unnamed(const std::string& path) {
  Fd fd(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd) return ErrnoStatus(errno, path);
  if (unlink(path.c_str()) != 0) return ErrnoStatus(errno, path);
  return fd;
}

template <typename T>
absl::string_view Bytes(const std::vector<T>& values) {
  return absl::string_view(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

}  // namespace

absl::Status Spool::Stream::Append(absl::string_view bytes) {
  buffer.append(bytes.data(), bytes.size());
  return buffer.size() < kPieceBytes ? absl::OkStatus() : Flush();
}

absl::Status Spool::Stream::Flush() {
  PPFT_RETURN_IF_ERROR(WriteAll(fd.get(), buffer, "token file"));
  buffer.clear();
  return absl::OkStatus();
}

absl::StatusOr<Spool> Spool::Create(const std::string& path) {
  Spool spool;
  const std::string base = absl::StrCat(path, ".spool-", getpid());
  PPFT_ASSIGN_OR_RETURN(spool.ids_.fd, Unnamed(absl::StrCat(base, "-ids")));
  PPFT_ASSIGN_OR_RETURN(spool.supervised_.fd, Unnamed(absl::StrCat(base, "-supervised")));
  return spool;
}

absl::Status Spool::Add(const TokenizedRow& row) {
  if (row.dropped) {
    ++dropped_;
    return absl::OkStatus();
  }
  PPFT_RETURN_IF_ERROR(ids_.Append(Bytes(row.ids)));
  PPFT_RETURN_IF_ERROR(supervised_.Append(Bytes(row.supervised)));
  entries_.push_back({row.number, num_tokens_, static_cast<int32_t>(row.ids.size()), row.targets, row.truncated});
  num_tokens_ += static_cast<int64_t>(row.ids.size());
  return absl::OkStatus();
}

absl::Status Spool::CopyRange(const Stream& from, int64_t begin, int64_t size, Stream* to) {
  std::string piece;
  while (size > 0) {
    piece.resize(std::min<size_t>(static_cast<size_t>(size), kPieceBytes));
    const ssize_t got = pread(from.fd.get(), piece.data(), piece.size(), begin);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, "temporary token file");
    if (got == 0) return absl::DataLossError("temporary token file: ends early");
    PPFT_RETURN_IF_ERROR(to->Append(absl::string_view(piece.data(), static_cast<size_t>(got))));
    begin += got;
    size -= got;
  }
  return absl::OkStatus();
}

absl::StatusOr<Counts> Spool::Write(const std::vector<int64_t>& chosen, const std::map<std::string, std::string>& metadata, const std::string& path) {
  PPFT_RETURN_IF_ERROR(ids_.Flush());
  PPFT_RETURN_IF_ERROR(supervised_.Flush());
  Counts counts;
  std::vector<int64_t> offsets = {0};
  std::vector<int64_t> rows;
  for (const int64_t index : chosen) {
    const Entry& entry = entries_[index];
    offsets.push_back(offsets.back() + entry.length);
    rows.push_back(entry.number);
    counts.targets += entry.targets;
    counts.truncated += entry.truncated ? 1 : 0;
    counts.max_length = std::max<int64_t>(counts.max_length, entry.length);
  }
  counts.rows = static_cast<int64_t>(rows.size());
  counts.tokens = offsets.back();

  Stream out;
  out.fd = Fd(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!out.fd) return ErrnoStatus(errno, path);
  PPFT_RETURN_IF_ERROR(out.Append(data::TokenFileHeader(counts.rows, counts.tokens, metadata)));
  PPFT_RETURN_IF_ERROR(out.Append(Bytes(offsets)));
  PPFT_RETURN_IF_ERROR(out.Append(Bytes(rows)));
  for (const int64_t index : chosen) {
    PPFT_RETURN_IF_ERROR(CopyRange(ids_, entries_[index].begin * 4, int64_t{entries_[index].length} * 4, &out));
  }
  for (const int64_t index : chosen) {
    PPFT_RETURN_IF_ERROR(CopyRange(supervised_, entries_[index].begin, entries_[index].length, &out));
  }
  PPFT_RETURN_IF_ERROR(out.Flush());
  if (fsync(out.fd.get()) != 0) return ErrnoStatus(errno, path);
  return counts;
}

}  // namespace ppft::coordinator::prepare
