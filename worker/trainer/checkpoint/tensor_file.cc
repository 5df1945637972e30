#include "worker/trainer/checkpoint/tensor_file.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

constexpr std::pair<const char*, at::ScalarType> kDtypes[] = {{"F32", at::kFloat}, {"BF16", at::kBFloat16}, {"F16", at::kHalf}, {"F64", at::kDouble},
                                                              {"I64", at::kLong},  {"I32", at::kInt},       {"U8", at::kByte},  {"BOOL", at::kBool}};

// A tensor over mapped bytes that keeps the mapping alive.
at::Tensor ViewOf(const std::shared_ptr<MappedFile>& mapping, int64_t offset, at::ScalarType dtype, const std::vector<int64_t>& shape) {
  void* data = const_cast<char*>(mapping->bytes().data()) + offset;
  return at::from_blob(
      data, shape, [mapping](void*) {}, dtype);
}

}  // namespace

absl::StatusOr<std::string> DtypeWord(at::ScalarType dtype) {
  for (const auto& [word, type] : kDtypes) {
    if (type == dtype) return std::string(word);
  }
  return absl::InvalidArgumentError(absl::StrCat("safetensors has no word for ", c10::toString(dtype)));
}

absl::StatusOr<at::ScalarType> DtypeOfWord(const std::string& dtype) {
  for (const auto& [word, type] : kDtypes) {
    if (dtype == word) return type;
  }
  return absl::InvalidArgumentError(absl::StrCat("tensors of type ", dtype, " are not supported"));
}

absl::StatusOr<TensorFile> TensorFile::Open(const std::string& path) {
  TensorFile file;
  file.path_ = path;
  PPFT_ASSIGN_OR_RETURN(file.header_, model::ReadSafetensorsHeader(path));
  PPFT_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::Open(path));
  file.mapping_ = std::make_shared<MappedFile>(std::move(mapping));
  for (const model::TensorInfo& tensor : file.header_.tensors) {
    if (tensor.offset + tensor.size_bytes > static_cast<int64_t>(file.mapping_->bytes().size())) {
      return absl::DataLossError(absl::StrCat(path, ": tensor ", tensor.name, " lies beyond the end of the file"));
    }
  }
  return file;
}

absl::StatusOr<at::Tensor> TensorFile::Read(const std::string& name) const {
  const model::TensorInfo* info = header_.Find(name);
  if (info == nullptr) return absl::NotFoundError(absl::StrCat(path_, " has no tensor ", name));
  PPFT_ASSIGN_OR_RETURN(const at::ScalarType dtype, DtypeOfWord(info->dtype));
  return CatchTorch(path_, [&]() -> absl::StatusOr<at::Tensor> {
    // safetensors aligns nothing: a tensor at an odd address is copied.
    if (reinterpret_cast<uintptr_t>(mapping_->bytes().data() + info->offset) % c10::elementSize(dtype) != 0) {
      at::Tensor copy = at::empty(info->shape, dtype);
      std::copy_n(mapping_->bytes().data() + info->offset, info->size_bytes, static_cast<char*>(copy.data_ptr()));
      return copy;
    }
    return ViewOf(mapping_, info->offset, dtype, info->shape);
  });
}

absl::StatusOr<at::Tensor> MapRawTensor(const std::string& path, at::ScalarType dtype, const std::vector<int64_t>& shape) {
  PPFT_ASSIGN_OR_RETURN(MappedFile opened, MappedFile::Open(path));
  const auto mapping = std::make_shared<MappedFile>(std::move(opened));
  int64_t expected = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t size : shape) expected *= size;
  if (static_cast<int64_t>(mapping->bytes().size()) != expected) {
    return absl::DataLossError(
        absl::StrCat(path, " has ", mapping->bytes().size(), " bytes; ", c10::toString(dtype), " ", model::ShapeText(shape), " needs ", expected));
  }
  return CatchTorch(path, [&]() -> absl::StatusOr<at::Tensor> { return ViewOf(mapping, 0, dtype, shape); });
}

absl::StatusOr<WrittenFile> WriteTensorFile(const std::string& path, const std::vector<NamedTensor>& tensors,
                                            const std::map<std::string, std::string>& metadata) {
  std::vector<model::TensorInfo> infos;
  for (const NamedTensor& t : tensors) {
    model::TensorInfo info;
    info.name = t.name;
    PPFT_ASSIGN_OR_RETURN(info.dtype, DtypeWord(t.tensor.scalar_type()));
    info.shape = t.tensor.sizes().vec();
    infos.push_back(std::move(info));
  }
  PPFT_ASSIGN_OR_RETURN(model::SafetensorsWriter writer, model::SafetensorsWriter::Create(path, infos, metadata));
  return CatchTorch(path, [&]() -> absl::StatusOr<WrittenFile> {
    for (const NamedTensor& t : tensors) {
      const at::Tensor plain = t.tensor.to(at::kCPU).contiguous();
      PPFT_RETURN_IF_ERROR(writer.Append(absl::string_view(static_cast<const char*>(plain.data_ptr()), plain.nbytes())));
    }
    PPFT_ASSIGN_OR_RETURN(std::string sha256, writer.Finish());
    return WrittenFile{path, std::move(sha256), writer.file_bytes()};
  });
}

absl::StatusOr<TensorSource> SourceOfFiles(const std::vector<std::string>& paths) {
  const auto files = std::make_shared<std::vector<TensorFile>>();
  for (const std::string& path : paths) {
    PPFT_ASSIGN_OR_RETURN(TensorFile file, TensorFile::Open(path));
    files->push_back(std::move(file));
  }
  return TensorSource([files](const std::string& name) -> absl::StatusOr<at::Tensor> {
    for (const TensorFile& file : *files) {
      if (file.Has(name)) return file.Read(name);
    }
    return absl::NotFoundError(absl::StrCat("the model has no tensor ", name));
  });
}

}  // namespace ppft::trainer
