#include "coordinator/artifacts/tensor_files.h"

#include <algorithm>
#include <functional>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "coordinator/artifacts/finite.h"

namespace ppft::coordinator {
namespace {

constexpr int64_t kPieceBytes = 1 << 20;

absl::Status ForEachPiece(int fd, const model::TensorInfo& info, const std::function<absl::Status(absl::string_view, int64_t at)>& visit) {
  std::string buffer(static_cast<size_t>(std::min(info.size_bytes, kPieceBytes)), '\0');
  for (int64_t at = 0; at < info.size_bytes;) {
    const int64_t size = std::min(info.size_bytes - at, kPieceBytes);
    PPFT_RETURN_IF_ERROR(ReadAt(fd, buffer.data(), size, info.offset + at, info.name));
    PPFT_RETURN_IF_ERROR(visit(absl::string_view(buffer.data(), static_cast<size_t>(size)), at));
    at += size;
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> SameBytes(int a_fd, const model::TensorInfo& a, int b_fd, const model::TensorInfo& b) {
  if (a.dtype != b.dtype || a.shape != b.shape) return false;
  bool same = true;
  std::string other(static_cast<size_t>(kPieceBytes), '\0');
  PPFT_RETURN_IF_ERROR(ForEachPiece(a_fd, a, [&](absl::string_view piece, int64_t at) -> absl::Status {
    PPFT_RETURN_IF_ERROR(ReadAt(b_fd, other.data(), static_cast<int64_t>(piece.size()), b.offset + at, b.name));
    same = same && piece == absl::string_view(other.data(), piece.size());
    return absl::OkStatus();
  }));
  return same;
}

// What lies on disk against where it came from.
absl::Status CheckWritten(const std::string& path, const std::vector<TensorSource>& tensors) {
  PPFT_ASSIGN_OR_RETURN(const model::SafetensorsHeader header, model::ReadSafetensorsHeader(path));
  PPFT_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));  // our own file: nobody shortens it
  if (header.tensors.size() != tensors.size()) return absl::DataLossError(absl::StrCat(path, ": read back with another number of tensors"));
  for (size_t i = 0; i < tensors.size(); ++i) {
    const model::TensorInfo& written = header.tensors[i];
    const model::TensorInfo& source = *tensors[i].info;
    bool same = written.dtype == source.dtype && written.shape == source.shape;
    PPFT_RETURN_IF_ERROR(ForEachPiece(tensors[i].file->fd.get(), source, [&](absl::string_view piece, int64_t at) {
      same = same && piece == file.bytes().substr(static_cast<size_t>(written.offset + at), piece.size());
      return absl::OkStatus();
    }));
    if (!same) return absl::DataLossError(absl::StrCat(path, ": ", source.name, " reads back with other bytes than were written; the disk may be failing"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<TensorFile>> TensorFile::Open(const BlobStore& blobs, const v1::FileRef& ref) {
  auto out = std::make_unique<TensorFile>();
  out->ref = ref;
  PPFT_ASSIGN_OR_RETURN(out->fd, blobs.OpenBlob(ref.sha256()));
  PPFT_ASSIGN_OR_RETURN(const int64_t size, FileSize(blobs.PathOf(ref.sha256())));
  PPFT_ASSIGN_OR_RETURN(out->header, model::ReadSafetensorsHeader(out->fd.get(), size, ref.name()));
  return out;
}

absl::StatusOr<bool> SameTensor(const TensorSource& a, const TensorSource& b) { return SameBytes(a.file->fd.get(), *a.info, b.file->fd.get(), *b.info); }

absl::StatusOr<bool> HasNonFinite(const TensorSource& tensor) {
  bool bad = false;
  PPFT_RETURN_IF_ERROR(ForEachPiece(tensor.file->fd.get(), *tensor.info, [&](absl::string_view piece, int64_t) {
    bad = bad || HasNonFiniteBytes(tensor.info->dtype, piece);
    return absl::OkStatus();
  }));
  return bad;
}

absl::StatusOr<v1::FileRef> JoinTensors(BlobStore& blobs, const std::vector<TensorSource>& tensors, const std::string& name) {
  PPFT_ASSIGN_OR_RETURN(const std::string folder, blobs.MakeTemporaryDir("join"));
  const std::string path = JoinPath(folder, name);
  const auto write = [&]() -> absl::StatusOr<v1::FileRef> {
    std::vector<model::TensorInfo> infos;
    for (const TensorSource& tensor : tensors) infos.push_back(*tensor.info);
    PPFT_ASSIGN_OR_RETURN(model::SafetensorsWriter writer, model::SafetensorsWriter::Create(path, infos, {{"format", "pt"}}));
    for (const TensorSource& tensor : tensors) {
      PPFT_RETURN_IF_ERROR(ForEachPiece(tensor.file->fd.get(), *tensor.info, [&](absl::string_view piece, int64_t) { return writer.Append(piece); }));
    }
    PPFT_RETURN_IF_ERROR(writer.Finish().status());
    PPFT_RETURN_IF_ERROR(CheckWritten(path, tensors));
    return blobs.AddFile(path, name);
  };
  absl::StatusOr<v1::FileRef> file = write();
  PPFT_RETURN_IF_ERROR(RemoveAll(folder));
  return file;
}

}  // namespace ppft::coordinator
