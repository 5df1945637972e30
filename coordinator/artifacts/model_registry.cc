#include "coordinator/artifacts/model_registry.h"

#include <google/protobuf/util/time_util.h>
#include <sys/stat.h>
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
#include "absl/time/time.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/net/status.h"
#include "coordinator/artifacts/file_check.h"
#include "coordinator/artifacts/model_check.h"
#include "coordinator/artifacts/requests.h"

namespace ppft::coordinator {
namespace {

constexpr char kMethod[] = "RegisterModel";
constexpr int kPageRows = 500;
constexpr int64_t kQuickBytes = int64_t{1} << 30;  // hashed within a second or two

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
  return WithMessage(status, absl::StrReplaceAll(status.message(), words));
}

absl::Status Changed(const std::string& model, const std::string& path, const std::string& how) {
  const std::string folder = path.substr(0, path.rfind('/'));
  absl::Status status = absl::FailedPreconditionError(absl::StrCat(path, ": ", how, "; it changed after the model ", model,
                                                                   " was registered: put it back as it was, or register the folder under another name (",
                                                                   "ppctl models register NAME FOLDER) and use that one"));
  net::SetErrorInfo(&status, {"MODEL_INVALID", {{"model", model}}});
  return status;
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

std::vector<ModelRegistry::Place> ModelRegistry::PlacesOf(const v1::ModelRecord& record) {
  std::map<std::string, const v1::ModelRecord::WeightFile*> files;
  for (const v1::ModelRecord::WeightFile& file : record.weight_files()) files[file.name()] = &file;
  std::vector<Place> places;
  for (const v1::ModelRecord::Tensor& tensor : record.tensors()) {
    Place place;
    place.model = record.model().name();
    place.tensor = tensor.tensor().name();
    place.sha256 = tensor.tensor().content().sha256();
    place.folder = record.model().path();
    place.file = tensor.file();
    place.offset = tensor.offset();
    place.size_bytes = tensor.tensor().content().size_bytes();
    if (const auto file = files.find(tensor.file()); file != files.end()) {
      place.file_bytes = file->second->size_bytes();
      place.modified_nanos = file->second->modified_unix_nanos();
    }
    places.push_back(std::move(place));
  }
  return places;
}

void ModelRegistry::Index(const v1::ModelRecord& record) {
  const std::vector<Place> places = PlacesOf(record);
  absl::MutexLock lock(&mutex_);
  for (const Place& place : places) {
    // Models may share tensors: any of their files will do.
    std::vector<Place>& known = tensors_[place.sha256];
    const bool there = std::any_of(known.begin(), known.end(), [&](const Place& other) {
      return other.folder == place.folder && other.file == place.file && other.offset == place.offset;
    });
    if (!there) known.push_back(place);
  }
}

bool ModelRegistry::Touched(const Place& place, int64_t modified_nanos) const {
  if (place.modified_nanos == 0 || modified_nanos == place.modified_nanos) return false;
  absl::MutexLock lock(&mutex_);
  const auto found = unchanged_.find(JoinPath(place.folder, place.file));
  return found == unchanged_.end() || found->second != modified_nanos;
}

absl::StatusOr<FileRange> ModelRegistry::OpenFile(const Place& place, int64_t* modified_nanos) const {
  const absl::StatusOr<ModelFolder> folder = ModelFolder::Resolve(roots_, place.folder);
  if (!folder.ok()) return Changed(place.model, place.folder, "the folder is gone, or no longer beneath a model root");
  const std::string path = JoinPath(place.folder, place.file);
  FileRange range;
  absl::StatusOr<Fd> fd = folder->Open(place.file);
  if (absl::IsNotFound(fd.status())) return Changed(place.model, path, "the file is gone");
  PPFT_RETURN_IF_ERROR(fd.status());
  range.fd = *std::move(fd);
  range.offset = place.offset;
  range.size_bytes = place.size_bytes;
  struct stat info;
  if (fstat(range.fd.get(), &info) != 0) return ErrnoStatus(errno, path);
  if ((place.file_bytes > 0 && info.st_size != place.file_bytes) || info.st_size < place.offset + place.size_bytes)
    return Changed(place.model, path, absl::StrCat("the file now has ", info.st_size, " bytes"));
  *modified_nanos = absl::ToUnixNanos(absl::TimeFromTimespec(info.st_mtim));
  return range;
}

absl::Status ModelRegistry::CheckContent(const Place& place, const FileRange& range) {
  const std::string path = JoinPath(place.folder, place.file);
  const absl::StatusOr<std::string> found = HashRange(range.fd, range.offset, range.size_bytes, path);
  if (!found.ok() && !absl::IsDataLoss(found.status())) return found.status();
  if (found.ok() && *found == place.sha256) return absl::OkStatus();
  return Changed(place.model, path, absl::StrCat("the tensor ", place.tensor, " has other values"));
}

absl::StatusOr<FileRange> ModelRegistry::OpenTensor(const std::string& sha256, bool check) const {
  std::vector<Place> places;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = tensors_.find(sha256);
    if (found == tensors_.end()) return absl::NotFoundError(absl::StrCat("no file with the content ", sha256));
    places = found->second;
  }
  absl::Status first;
  for (const Place& place : places) {
    int64_t modified_nanos = 0;
    absl::StatusOr<FileRange> range = OpenFile(place, &modified_nanos);
    absl::Status status = range.status();
    if (status.ok() && (check || Touched(place, modified_nanos))) status = CheckContent(place, *range);
    if (status.ok()) return range;
    if (first.ok()) first = status;
  }
  return first;
}

absl::Status ModelRegistry::CheckUnchanged(const v1::ModelRecord& model) {
  const std::vector<Place> places = PlacesOf(model);
  std::map<std::string, int64_t> touched;  // path -> time of the change
  int64_t touched_bytes = 0;
  for (const Place& place : places) {
    int64_t modified_nanos = 0;
    PPFT_RETURN_IF_ERROR(OpenFile(place, &modified_nanos).status());
    if (!Touched(place, modified_nanos)) continue;
    touched[JoinPath(place.folder, place.file)] = modified_nanos;
    touched_bytes += place.size_bytes;
  }
  if (touched_bytes > kQuickBytes) return absl::OkStatus();
  for (const Place& place : places) {
    if (touched.count(JoinPath(place.folder, place.file)) == 0) continue;
    int64_t modified_nanos = 0;
    PPFT_ASSIGN_OR_RETURN(const FileRange range, OpenFile(place, &modified_nanos));
    PPFT_RETURN_IF_ERROR(CheckContent(place, range));
  }
  absl::MutexLock lock(&mutex_);
  for (const auto& [path, time] : touched) unchanged_[path] = time;
  return absl::OkStatus();
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
  if (request.source_case() == v1::RegisterModelRequest::kFiles) {
    // Their blobs are touched whenever they are used.
    for (v1::ModelRecord::WeightFile& file : *record.mutable_weight_files()) file.set_modified_unix_nanos(0);
  }
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
  const auto known = controller.Run([&](JobStore& store) -> absl::StatusOr<std::optional<v1::ModelRecord>> {
    PPFT_ASSIGN_OR_RETURN(const std::optional<std::string> name, store.FindRequest(kMethod, request.request_id(), PayloadSha256(request)));
    if (!name) return std::optional<v1::ModelRecord>();
    PPFT_ASSIGN_OR_RETURN(v1::ModelRecord record, store.GetModel(*name));
    return std::optional<v1::ModelRecord>(std::move(record));
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
