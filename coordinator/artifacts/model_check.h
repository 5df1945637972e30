// Everything that is checked before a model is registered, in one reading of its bytes: config.json, tokenizer, safetensors headers, the tensors'
// names and shapes, every weight finite; and the content hash of each tensor.
#pragma once

#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/model_folder.h"
#include "coordinator/artifacts/prepare_runner.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// INVALID_ARGUMENT names file, tensor or field, and the remedy. The text files are copied into `blobs`; nothing else is kept after an error.
// `threads` hash and scan the weights. model.name and create_time of the result are left to the caller.
absl::StatusOr<v1::ModelRecord> CheckModel(const ModelFolder& folder, BlobStore& blobs, PrepareRunner& prepare, int threads,
                                           const std::function<bool()>& cancelled);

// The same config, tokenizer and tensor contents.
bool SameContent(const v1::ModelRecord& a, const v1::ModelRecord& b);

}  // namespace ppft::coordinator
