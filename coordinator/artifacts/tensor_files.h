// Joins tensors of several safetensors blobs into one file, streaming: memory does not grow with the model. The result is read back and compared
// with its sources byte by byte before it becomes a blob.
//
// Thread: any; blocks. Errors: DATA_LOSS for a blob that is shorter than its header says and for what reads back with
// other bytes; else those of the blob store and of the file system (RESOURCE_EXHAUSTED for a full disk).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/safetensors.h"
#include "coordinator/artifacts/blob_store.h"

namespace ppft::coordinator {

// One open safetensors blob.
struct TensorFile {
  v1::FileRef ref;
  Fd fd;
  model::SafetensorsHeader header;

  static absl::StatusOr<std::unique_ptr<TensorFile>> Open(const BlobStore& blobs, const v1::FileRef& ref);
};

// One tensor in it.
struct TensorSource {
  const TensorFile* file = nullptr;
  const model::TensorInfo* info = nullptr;
};

// The same dtype, shape and bytes?
absl::StatusOr<bool> SameTensor(const TensorSource& a, const TensorSource& b);

// NaN or infinite values (F32, BF16, F16; other types never).
absl::StatusOr<bool> HasNonFinite(const TensorSource& tensor);

// A file of these tensors in this order, with metadata format = pt, which transformers asks for. The same tensors give the same bytes.
absl::StatusOr<v1::FileRef> JoinTensors(BlobStore& blobs, const std::vector<TensorSource>& tensors, const std::string& name);

}  // namespace ppft::coordinator
