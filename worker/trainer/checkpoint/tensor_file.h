// Tensors in safetensors files: reading by memory mapping, durable writing, and a base model's folder as a TensorSource. EDGE to the file system.
// Any thread; the tensors of one file share its mapping and keep it alive.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/files.h"
#include "common/model/safetensors.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

struct NamedTensor {
  std::string name;
  at::Tensor tensor;
};

// What lies on disk after a write.
struct WrittenFile {
  std::string path;
  std::string sha256;
  int64_t size_bytes = 0;
};

// safetensors' word ("F32") of a dtype; INVALID_ARGUMENT for one that the format does not know.
absl::StatusOr<std::string> DtypeWord(at::ScalarType dtype);
absl::StatusOr<at::ScalarType> DtypeOfWord(const std::string& word);

class TensorFile {
 public:
  // INVALID_ARGUMENT or DATA_LOSS with the path if the header or the size is wrong.
  static absl::StatusOr<TensorFile> Open(const std::string& path);

  const model::SafetensorsHeader& header() const { return header_; }
  bool Has(const std::string& name) const { return header_.Find(name) != nullptr; }
  // A read-only view of the mapped file; NOT_FOUND with path and name.
  absl::StatusOr<at::Tensor> Read(const std::string& name) const;

 private:
  std::string path_;
  model::SafetensorsHeader header_;
  std::shared_ptr<MappedFile> mapping_;
};

// The whole file as one tensor of that dtype and shape (no header), mapped. DATA_LOSS if the size differs.
absl::StatusOr<at::Tensor> MapRawTensor(const std::string& path, at::ScalarType dtype, const std::vector<int64_t>& shape);

// Front to back, then fsync. The same tensors give the same bytes. An existing file is replaced.
absl::StatusOr<WrittenFile> WriteTensorFile(const std::string& path, const std::vector<NamedTensor>& tensors,
                                            const std::map<std::string, std::string>& metadata);

// Reads from these files, each name from the first that has it.
absl::StatusOr<TensorSource> SourceOfFiles(const std::vector<std::string>& paths);

}  // namespace ppft::trainer
