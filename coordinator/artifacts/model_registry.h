// ModelRegistry: registered models and where their tensors' bytes lie. The rows are in the JobStore; the index by content is rebuilt from them at
// the start. Thread-safe; Register blocks while it reads the model.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/model_folder.h"
#include "coordinator/artifacts/prepare_runner.h"
#include "coordinator/controller.h"
#include "ppft/v1/model.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// Bytes [offset, offset + size_bytes) of an open file.
struct FileRange {
  Fd fd;
  int64_t offset = 0;
  int64_t size_bytes = 0;
};

class ModelRegistry {
 public:
  // `model_roots`: what --model_root allows. Uploaded models lie in DATA_DIR/models.
  ModelRegistry(BlobStore* blobs, PrepareRunner* prepare, std::vector<std::string> model_roots);

  // Before anything else: reads all models, and removes folders of uploads that never became a model.
  absl::Status Load(Controller& controller);

  // Checks everything, then commits the row. The same name with the same content answers the first row; with another one ALREADY_EXISTS.
  absl::StatusOr<v1::Model> Register(Controller& controller, const v1::RegisterModelRequest& request, const std::function<bool()>& cancelled);

  // Where models may lie: the roots of the users, and that of uploads.
  const std::vector<std::string>& roots() const { return roots_; }
  // The tensor with this content, in any model. NOT_FOUND.
  absl::StatusOr<FileRange> OpenTensor(const std::string& sha256) const;

 private:
  struct Place {
    std::string folder;
    std::string file;
    int64_t offset = 0;
    int64_t size_bytes = 0;
  };

  std::string UploadedDir() const { return JoinPath(blobs_->data_dir(), "models"); }
  // A folder of hard links to the uploaded blobs; `made` is its path.
  absl::StatusOr<ModelFolder> LinkUploads(const v1::RegisterModelRequest& request, std::string* made);
  absl::StatusOr<v1::ModelRecord> Check(const v1::RegisterModelRequest& request, const std::function<bool()>& cancelled, std::string* made);
  absl::StatusOr<v1::ModelRecord> Commit(Controller& controller, const v1::RegisterModelRequest& request, const v1::ModelRecord& record);
  void Index(const v1::ModelRecord& record);

  BlobStore* const blobs_;
  PrepareRunner* const prepare_;
  const std::vector<std::string> roots_;  // model_roots and UploadedDir()
  const std::vector<std::string> user_roots_;
  absl::Mutex register_mutex_;  // one registration at a time: each uses all cores
  mutable absl::Mutex mutex_;
  std::map<std::string, Place> tensors_ ABSL_GUARDED_BY(mutex_);  // by sha256
};

}  // namespace ppft::coordinator
