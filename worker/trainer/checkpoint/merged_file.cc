#include "worker/trainer/checkpoint/merged_file.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::trainer {
namespace {

constexpr size_t kPartBytes = size_t{32} << 20;

}  // namespace

absl::StatusOr<WrittenFile> WriteMergedFile(const std::string& path, const std::vector<StageModel*>& stages, at::ScalarType dtype,
                                            const std::function<void()>& progress) {
  PPFT_ASSIGN_OR_RETURN(const std::string word, DtypeWord(dtype));
  std::vector<model::TensorInfo> infos;
  for (const StageModel* stage : stages) {
    for (const model::ExpectedTensor& tensor : stage->merged_tensors()) {
      model::TensorInfo info;
      info.name = tensor.name;
      info.dtype = word;
      info.shape = tensor.shape;
      infos.push_back(std::move(info));
    }
  }
  PPFT_ASSIGN_OR_RETURN(model::SafetensorsWriter writer, model::SafetensorsWriter::Create(path, infos, {{"format", "pt"}}));
  size_t next = 0;
  for (StageModel* stage : stages) {
    PPFT_RETURN_IF_ERROR(stage->ForEachMerged(dtype, [&](const std::string& name, const at::Tensor& tensor) -> absl::Status {
      if (next >= infos.size() || infos[next].name != name) return absl::InternalError(absl::StrCat(path, ": unexpected tensor ", name));
      ++next;
      progress();
      absl::string_view bytes(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
      while (!bytes.empty()) {
        PPFT_RETURN_IF_ERROR(writer.Append(bytes.substr(0, kPartBytes)));
        bytes.remove_prefix(std::min(kPartBytes, bytes.size()));
        progress();
      }
      return absl::OkStatus();
    }));
  }
  PPFT_ASSIGN_OR_RETURN(std::string sha256, writer.Finish());
  return WrittenFile{path, std::move(sha256), writer.file_bytes()};
}

}  // namespace ppft::trainer
