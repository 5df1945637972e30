// Are registered files still what they were when they were registered? EDGE: reads model folders and blobs.
//
// Thread: one at a time per object, not the controller's: with contents it reads for long.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/files.h"
#include "coordinator/artifacts/blob_store.h"
#include "ppft/v1/cluster.pb.h"
#include "ppft/v1/dataset.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// SHA-256 of the bytes [offset, offset + size_bytes); `name` for messages. DATA_LOSS if the file is shorter.
absl::StatusOr<std::string> HashRange(const Fd& fd, int64_t offset, int64_t size_bytes, const std::string& name);

class FileCheckup {
 public:
  // Sizes only, or with `contents` every byte. `blobs` outlives this object.
  FileCheckup(const BlobStore& blobs, std::vector<std::string> model_roots, bool contents)
      : blobs_(blobs), roots_(std::move(model_roots)), contents_(contents) {}

  void Add(const v1::ModelRecord& model);
  void Add(const v1::Dataset& dataset);
  const v1::CheckFilesResponse& result() const { return result_; }

 private:
  absl::Status CheckBlob(const std::string& name, const std::string& sha256, int64_t size_bytes);
  absl::Status CheckWeights(const v1::ModelRecord& model);

  const BlobStore& blobs_;
  const std::vector<std::string> roots_;
  const bool contents_;
  v1::CheckFilesResponse result_;
};

}  // namespace ppft::coordinator
