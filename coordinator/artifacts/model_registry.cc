#include "coordinator/artifacts/model_registry.h"

#include <google/protobuf/util/time_util.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "coordinator/artifacts/model_check.h"
#include "coordinator/artifacts/requests.h"

namespace ppft::coordinator {
namespace {

constexpr char kMethod[] = "RegisterModel";
constexpr int kPageRows = 500;

absl::Status CheckName(const std::string& name) {
  const bool good = !name.empty() && name.size() <= 128 && name[0] != '.' && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
  });
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("name \"", name.substr(0, 140), "\": must have 1 to 128 characters of a-z A-Z 0-9 . _ - and not begin with a point"));
}

std::vector<std::string> With(std::vector<std::string> roots, std::string one) {
  roots.push_back(std::move(one));
  return roots;
}

constexpr size_t kMaxSource = 1000;

// The same status with other words for some folders, longest first.
absl::Status Reword(const absl::Status& status, const std::vector<std::pair<std::string, std::string>>& words) {
  absl::Status out(status.code(), absl::StrReplaceAll(status.message(), words));
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) { out.SetPayload(url, payload); });
  return out;
}

absl::Status PutBlobRows(JobStore& store, const v1::ModelRecord& record) {
  for (const v1::FileRef& file : record.files()) PPFT_RETURN_IF_ERROR(store.PutBlob({file.sha256(), file.size_bytes(), absl::Now()}));
  return absl::OkStatus();
}

}  // namespace

ModelRegistry::ModelRegistry(BlobStore* blobs, PrepareRunner* prepare, std::vector<std::string> model_roots)
    : blobs_(blobs), prepare_(prepare), roots_(With(model_roots, JoinPath(blobs->data_dir(), "models"))), user_roots_(std::move(model_roots)) {}

absl::Status ModelRegistry::Load(Controller& controller) {
  PPFT_RETURN_IF_ERROR(MakeDirs(UploadedDir()));
  PPFT_ASSIGN_OR_RETURN(const std::vector<v1::ModelRecord> records, controller.Run([](JobStore& store) -> absl::StatusOr<std::vector<v1::ModelRecord>> {
    std::vector<v1::ModelRecord> out;
    Page page{kPageRows, ""};
    while (true) {
      PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Model> models, store.ListModels(page));
      for (const v1::Model& model : models) {
        PPFT_ASSIGN_OR_RETURN(v1::ModelRecord record, store.GetModel(model.name()));
        out.push_back(std::move(record));
      }
      if (static_cast<int>(models.size()) < kPageRows) return out;
      page.after = models.back().name();
    }
  }));
  std::set<std::string> named;
  for (const v1::ModelRecord& record : records) {
    named.insert(record.model().name());
    Index(record);
  }
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> folders, ListDir(UploadedDir()));
  for (const std::string& folder : folders) {
    if (named.count(folder) == 0) PPFT_RETURN_IF_ERROR(RemoveAll(JoinPath(UploadedDir(), folder)));
  }
  return absl::OkStatus();
}

void ModelRegistry::Index(const v1::ModelRecord& record) {
  absl::MutexLock lock(&mutex_);
  for (const v1::ModelRecord::Tensor& tensor : record.tensors()) {
    // The first place stays: two models may share tensors.
    tensors_.emplace(tensor.tensor().content().sha256(), Place{record.model().path(), tensor.file(), tensor.offset(), tensor.tensor().content().size_bytes()});
  }
}

absl::StatusOr<FileRange> ModelRegistry::OpenTensor(const std::string& sha256) const {
  Place place;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = tensors_.find(sha256);
    if (found == tensors_.end()) return absl::NotFoundError(absl::StrCat("no file with the content ", sha256));
    place = found->second;
  }
  PPFT_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Resolve(roots_, place.folder));
  FileRange range;
  PPFT_ASSIGN_OR_RETURN(range.fd, folder.Open(place.file));
  range.offset = place.offset;
  range.size_bytes = place.size_bytes;
  return range;
}

absl::StatusOr<ModelFolder> ModelRegistry::LinkUploads(const v1::RegisterModelRequest& request, std::string* made) {
  if (request.files().files().empty()) return absl::InvalidArgumentError("files: no file was named");
  const std::string folder = JoinPath(UploadedDir(), request.name());
  if (PathExists(folder)) {
    // A row owns it, or a registration that failed left it: the caller has looked the name up.
    return absl::AlreadyExistsError(absl::StrCat("the name ", request.name(), " is taken by a model with other content; choose another name"));
  }
  PPFT_ASSIGN_OR_RETURN(const std::string staging, blobs_->MakeTemporaryDir("model"));
  *made = staging;
  for (const v1::FileRef& file : request.files().files()) {
    if (file.name().empty() || file.name()[0] == '.' || file.name().find('/') != std::string::npos || file.name().find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat("files: \"", file.name().substr(0, 100), "\" is no plain file name"));
    }
    if (!blobs_->Touch(file.sha256()))
      return absl::FailedPreconditionError(absl::StrCat(file.name(), ": its content ", file.sha256(), " has not been uploaded"));
    if (link(blobs_->PathOf(file.sha256()).c_str(), JoinPath(staging, file.name()).c_str()) != 0) return ErrnoStatus(errno, file.name());
  }
  PPFT_RETURN_IF_ERROR(SyncPath(staging));
  PPFT_RETURN_IF_ERROR(RenameDurably(staging, folder));
  *made = folder;
  return ModelFolder::Resolve({UploadedDir()}, folder);
}

absl::StatusOr<v1::ModelRecord> ModelRegistry::Check(const v1::RegisterModelRequest& request, const std::function<bool()>& cancelled, std::string* made) {
  ModelFolder folder;
  if (request.source_case() == v1::RegisterModelRequest::kPath) {
    PPFT_ASSIGN_OR_RETURN(folder, ModelFolder::Resolve(user_roots_, request.path()));
  } else if (request.source_case() == v1::RegisterModelRequest::kFiles) {
    PPFT_ASSIGN_OR_RETURN(folder, LinkUploads(request, made));
  } else {
    return absl::InvalidArgumentError("path or files must be given");
  }
  const int threads = std::max(1u, std::min(8u, std::thread::hardware_concurrency()));
  absl::StatusOr<v1::ModelRecord> checked = CheckModel(folder, *blobs_, *prepare_, threads, cancelled);
  if (!checked.ok() && request.source_case() == v1::RegisterModelRequest::kFiles) {
    // The user knows the folder that was uploaded, not where its copy lies here.
    const std::string source = request.files().source().substr(0, kMaxSource);
    return Reword(checked.status(),
                  {{absl::StrCat(*made, "/"), source.empty() ? "" : JoinPath(source, "")}, {*made, source.empty() ? request.name() : source}});
  }
  PPFT_RETURN_IF_ERROR(checked.status());
  v1::ModelRecord record = *std::move(checked);
  record.mutable_model()->set_name(request.name());
  *record.mutable_model()->mutable_create_time() = google::protobuf::util::TimeUtil::GetCurrentTime();
  return record;
}

absl::StatusOr<v1::ModelRecord> ModelRegistry::Commit(Controller& controller, const v1::RegisterModelRequest& request, const v1::ModelRecord& record) {
  return controller.Run([&](JobStore& store) -> absl::StatusOr<v1::ModelRecord> {
    PPFT_RETURN_IF_ERROR(PutBlobRows(store, record));
    const absl::Status inserted = store.InsertModel(record);
    if (!inserted.ok() && !absl::IsAlreadyExists(inserted)) return inserted;
    PPFT_ASSIGN_OR_RETURN(v1::ModelRecord stored, store.GetModel(request.name()));
    if (!SameContent(stored, record)) {
      return absl::AlreadyExistsError(
          absl::StrCat("the name ", request.name(), " is taken by a model with other content (", stored.model().path(), "); choose another name"));
    }
    PPFT_RETURN_IF_ERROR(store.PutRequest(kMethod, request.request_id(), PayloadSha256(request), request.name()));
    return stored;
  });
}

absl::StatusOr<v1::Model> ModelRegistry::Register(Controller& controller, const v1::RegisterModelRequest& request, const std::function<bool()>& cancelled) {
  PPFT_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  PPFT_RETURN_IF_ERROR(CheckName(request.name()));
  absl::MutexLock lock(&register_mutex_);
  const auto known = controller.Run([&](JobStore& store) -> absl::StatusOr<absl::optional<v1::ModelRecord>> {
    PPFT_ASSIGN_OR_RETURN(const absl::optional<std::string> name, store.FindRequest(kMethod, request.request_id(), PayloadSha256(request)));
    if (!name) return absl::optional<v1::ModelRecord>();
    PPFT_ASSIGN_OR_RETURN(v1::ModelRecord record, store.GetModel(*name));
    return absl::optional<v1::ModelRecord>(std::move(record));
  });
  PPFT_RETURN_IF_ERROR(known.status());
  if (known->has_value()) return (*known)->model();

  // An uploaded model of this name that is registered already: the contents decide, without another copy.
  std::string made;
  v1::RegisterModelRequest checked = request;
  absl::StatusOr<v1::ModelRecord> existing = controller.Run([&](JobStore& store) { return store.GetModel(request.name()); });
  if (existing.ok() && request.source_case() == v1::RegisterModelRequest::kFiles) checked.set_name(absl::StrCat(request.name(), ".again"));
  absl::StatusOr<v1::ModelRecord> record = Check(checked, cancelled, &made);
  if (record.ok()) {
    record->mutable_model()->set_name(request.name());
    record = Commit(controller, request, *record);
  }
  const bool owned = record.ok() && record->model().path() == made;
  if (!made.empty() && !owned) {
    const absl::Status removed = RemoveAll(made);
    if (!removed.ok()) LogWarning("a model folder stays until the next start: ", std::string(removed.message()));
  }
  PPFT_RETURN_IF_ERROR(record.status());
  Index(*record);
  return record->model();
}

}  // namespace ppft::coordinator
