#include "coordinator/artifacts/file_check.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "coordinator/artifacts/model_folder.h"

namespace ppft::coordinator {
namespace {

constexpr int64_t kReadBytes = 1 << 20;

}  // namespace

absl::StatusOr<std::string> HashRange(const Fd& fd, int64_t offset, int64_t size_bytes, const std::string& name) {
  Sha256 sha;
  std::string buffer(static_cast<size_t>(kReadBytes), '\0');
  for (int64_t done = 0; done < size_bytes;) {
    const ssize_t got = pread(fd.get(), buffer.data(), static_cast<size_t>(std::min(kReadBytes, size_bytes - done)), offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, name);
    if (got == 0) return absl::DataLossError(absl::StrCat(name, " is shorter than it was"));
    sha.Update(absl::string_view(buffer.data(), static_cast<size_t>(got)));
    done += got;
  }
  return sha.HexDigest();
}

absl::Status FileCheckup::CheckBlob(const std::string& name, const std::string& sha256, int64_t size_bytes) {
  const std::optional<int64_t> size = blobs_.Find(sha256);
  if (!size.has_value()) return absl::DataLossError(absl::StrCat(name, ": its content is missing from the coordinator's data folder"));
  if (*size != size_bytes) return absl::DataLossError(absl::StrCat(name, ": its content has ", *size, " bytes instead of ", size_bytes));
  if (!contents_) return absl::OkStatus();
  PPFT_ASSIGN_OR_RETURN(const Fd fd, blobs_.OpenBlob(sha256));
  PPFT_ASSIGN_OR_RETURN(const std::string found, HashRange(fd, 0, size_bytes, name));
  result_.set_checked_bytes(result_.checked_bytes() + size_bytes);
  return found == sha256 ? absl::OkStatus() : absl::DataLossError(absl::StrCat(name, ": its content has changed in the coordinator's data folder"));
}

absl::Status FileCheckup::CheckWeights(const v1::ModelRecord& model) {
  PPFT_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Resolve(roots_, model.model().path()));
  std::map<std::string, Fd> open;
  for (const v1::ModelRecord::Tensor& tensor : model.tensors()) {
    const v1::FileRef& content = tensor.tensor().content();
    const std::string path = JoinPath(model.model().path(), tensor.file());
    auto file = open.find(tensor.file());
    if (file == open.end()) {
      PPFT_ASSIGN_OR_RETURN(Fd fd, folder.Open(tensor.file()));
      file = open.emplace(tensor.file(), std::move(fd)).first;
    }
    struct stat status;
    if (fstat(file->second.get(), &status) != 0) return ErrnoStatus(errno, path);
    if (status.st_size < tensor.offset() + content.size_bytes()) return absl::DataLossError(absl::StrCat(path, " is shorter than it was"));
    if (!contents_) continue;
    PPFT_ASSIGN_OR_RETURN(const std::string found, HashRange(file->second, tensor.offset(), content.size_bytes(), path));
    result_.set_checked_bytes(result_.checked_bytes() + content.size_bytes());
    if (found != content.sha256()) return absl::DataLossError(absl::StrCat(path, ": tensor ", tensor.tensor().name(), " has changed"));
  }
  return absl::OkStatus();
}

void FileCheckup::Add(const v1::ModelRecord& model) {
  result_.set_num_models(result_.num_models() + 1);
  absl::Status status = CheckWeights(model);
  for (const v1::FileRef& file : model.files()) {
    if (status.ok()) status = CheckBlob(file.name(), file.sha256(), file.size_bytes());
  }
  if (status.ok()) return;
  v1::FileProblem& problem = *result_.add_problems();
  problem.set_owner(absl::StrCat("model ", model.model().name()));
  problem.set_message(std::string(status.message()));
  problem.set_remedy("put the files back as they were, or register the model under another name");
}

void FileCheckup::Add(const v1::Dataset& dataset) {
  result_.set_num_datasets(result_.num_datasets() + 1);
  const absl::Status status = CheckBlob(dataset.name(), dataset.sha256(), dataset.size_bytes());
  if (status.ok()) return;
  v1::FileProblem& problem = *result_.add_problems();
  problem.set_owner(absl::StrCat("dataset ", dataset.id()));
  problem.set_message(std::string(status.message()));
  problem.set_remedy("upload it again with ppctl data upload");
}

}  // namespace ppft::coordinator
