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
  // The tensor with this content, in any model; hashed first if `check` or if its file was touched since the registration. NOT_FOUND if no model has it;
  // FAILED_PRECONDITION with the reason MODEL_INVALID, file, tensor and remedy if the file is not what was registered.
  absl::StatusOr<FileRange> OpenTensor(const std::string& sha256, bool check) const;
  // Are the model's files what was registered? The same errors. Sizes and times are compared; files that were touched are hashed if that is quick, larger
  // ones tensor by tensor when they are served.
  absl::Status CheckUnchanged(const v1::ModelRecord& model);

 private:
  struct Place {
    std::string model;
    std::string tensor;
    std::string sha256;
    std::string folder;
    std::string file;
    int64_t offset = 0;
    int64_t size_bytes = 0;
    int64_t file_bytes = 0;      // when registered; 0 = not known
    int64_t modified_nanos = 0;  // when registered; 0 = not known, or of no meaning: uploads share their files
  };

  std::string UploadedDir() const { return JoinPath(blobs_->data_dir(), "models"); }
  // A folder of hard links to the uploaded blobs; `made` is its path.
  absl::StatusOr<ModelFolder> LinkUploads(const v1::RegisterModelRequest& request, std::string* made);
  absl::StatusOr<v1::ModelRecord> Check(const v1::RegisterModelRequest& request, const std::function<bool()>& cancelled, std::string* made);
  absl::StatusOr<v1::ModelRecord> Commit(Controller& controller, const v1::RegisterModelRequest& request, const v1::ModelRecord& record);
  void Index(const v1::ModelRecord& record);
  static std::vector<Place> PlacesOf(const v1::ModelRecord& record);
  // The range of a file that has its size still.
  absl::StatusOr<FileRange> OpenFile(const Place& place, int64_t* modified_nanos) const;
  static absl::Status CheckContent(const Place& place, const FileRange& range);
  // True if the file was touched since the registration and since it was last found unchanged.
  bool Touched(const Place& place, int64_t modified_nanos) const;

  BlobStore* const blobs_;
  PrepareRunner* const prepare_;
  const std::vector<std::string> roots_;  // model_roots and UploadedDir()
  const std::vector<std::string> user_roots_;
  absl::Mutex register_mutex_;  // one registration at a time: each uses all cores
  mutable absl::Mutex mutex_;
  std::map<std::string, std::vector<Place>> tensors_ ABSL_GUARDED_BY(mutex_);  // by sha256
  std::map<std::string, int64_t> unchanged_ ABSL_GUARDED_BY(mutex_);           // path -> time of change of a file that was found to be as registered
};

}  // namespace ppft::coordinator
