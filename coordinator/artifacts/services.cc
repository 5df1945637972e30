#include "coordinator/artifacts/services.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/net/status.h"
#include "coordinator/artifacts/assembly.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/artifacts/requests.h"

namespace ppft::coordinator {
namespace {

constexpr int kDefaultPageRows = 100;
constexpr int kMaxPageRows = 1000;
constexpr int kMaxPreviewRows = 100;
constexpr int kAllMetricRows = 10'000'000;

grpc::Status Reply(const absl::Status& status) { return net::ToGrpcStatus(status); }

template <typename T>
grpc::Status Reply(absl::StatusOr<T> result, T* response) {
  if (result.ok()) *response = *std::move(result);
  return net::ToGrpcStatus(result.status());
}

absl::StatusOr<int> PageRows(int32_t page_size) {
  if (page_size < 0 || page_size > kMaxPageRows)
    return absl::InvalidArgumentError(absl::StrCat("page_size (", page_size, ") must be from 0 to ", kMaxPageRows));
  return page_size == 0 ? kDefaultPageRows : page_size;
}

// Of a file that was just uploaded. On the controller's thread, where files that nothing names go.
absl::Status PutUploadedRow(JobStore& store, const BlobStore& blobs, const v1::FileRef& file) {
  if (!blobs.Touch(file.sha256())) return absl::AbortedError("the file has gone since it was found here: send it again");
  return store.PutBlob({file.sha256(), file.size_bytes(), absl::Now()});
}

absl::Status PutBlobRow(JobStore& store, const v1::FileRef& file) { return store.PutBlob({file.sha256(), file.size_bytes(), absl::Now()}); }

absl::Status CheckDatasetName(const std::string& name) {
  const bool good =
      !name.empty() && name.size() <= 255 && std::none_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == '/'; });
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError("name: must have 1 to 255 characters without '/' and control characters");
}

// A dataset by id, or by a name that only one has.
absl::StatusOr<v1::Dataset> FindDataset(JobStore& store, const std::string& id) {
  absl::StatusOr<v1::Dataset> dataset = store.GetDataset(id);
  if (!absl::IsNotFound(dataset.status())) return dataset;
  PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Dataset> named, store.FindDatasetsByName(id));
  if (named.empty()) return dataset;
  if (named.size() > 1) return absl::FailedPreconditionError(absl::StrCat(named.size(), " datasets have the name \"", id, "\"; use an id"));
  return named[0];
}

grpc::Status NotYet(const char* what) { return Reply(absl::UnimplementedError(absl::StrCat(what, " is not supported yet"))); }

// Reads a client's upload. `next` gives the next message's data or nullptr at the end of the stream.
absl::Status Receive(BlobStore::Upload& upload, const std::function<absl::StatusOr<const std::string*>()>& next) {
  while (!upload.complete()) {
    PPFT_ASSIGN_OR_RETURN(const std::string* data, next());
    if (data == nullptr) break;
    if (static_cast<int64_t>(data->size()) > kMaxChunkBytes)
      return absl::InvalidArgumentError(absl::StrCat("a chunk may have at most ", kMaxChunkBytes, " bytes"));
    PPFT_RETURN_IF_ERROR(upload.Append(*data));
  }
  return upload.Commit();
}

template <typename Request>
std::function<absl::StatusOr<const std::string*>()> DataOf(grpc::ServerContext* context, grpc::ServerReader<Request>* reader, Request* request) {
  return [=]() -> absl::StatusOr<const std::string*> {
    if (!reader->Read(request)) {
      if (context->IsCancelled()) return absl::CancelledError("the client has gone");
      return static_cast<const std::string*>(nullptr);
    }
    if (!request->has_data()) return absl::InvalidArgumentError("after the header only data may follow");
    return &request->data();
  };
}

}  // namespace

grpc::Status BlobServiceImpl::GetBlob(grpc::ServerContext*, const v1::GetBlobRequest* request, v1::GetBlobResponse* response) {
  if (!IsSha256Hex(request->sha256())) return Reply(absl::InvalidArgumentError("sha256 must be 64 lower-case hex digits"));
  const absl::optional<int64_t> size = blobs_->Find(request->sha256());
  if (size) blobs_->Touch(request->sha256());  // the caller is about to name it
  response->set_complete(size.has_value());
  response->set_received_bytes(size ? *size : blobs_->ReceivedBytes(request->sha256()));
  return grpc::Status::OK;
}

grpc::Status BlobServiceImpl::UploadBlob(grpc::ServerContext* context, grpc::ServerReader<v1::UploadBlobRequest>* reader, v1::UploadBlobResponse* response) {
  v1::UploadBlobRequest request;
  if (!reader->Read(&request) || !request.has_header()) return Reply(absl::InvalidArgumentError("the first message must be a header"));
  const v1::UploadBlobRequest::Header header = request.header();
  auto upload = blobs_->StartUpload(header.sha256(), header.sha256(), header.size_bytes(), header.offset());
  if (!upload.ok()) return Reply(upload.status());
  absl::Status status = Receive(**upload, DataOf(context, reader, &request));
  if (!status.ok()) return Reply(status);
  v1::FileRef file;
  file.set_sha256(header.sha256());
  file.set_size_bytes(header.size_bytes());
  status = controller_->Run([this, file](JobStore& store) { return PutUploadedRow(store, *blobs_, file); });
  response->set_sha256(header.sha256());
  response->set_size_bytes(header.size_bytes());
  return Reply(status);
}

grpc::Status DatasetServiceImpl::CreateDataset(grpc::ServerContext*, const v1::CreateDatasetRequest* request, v1::Dataset* response) {
  const auto create = [&]() -> absl::StatusOr<v1::Dataset> {
    PPFT_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
    PPFT_RETURN_IF_ERROR(CheckDatasetName(request->name()));
    const absl::optional<int64_t> size = blobs_->Find(request->sha256());
    if (!size) return absl::FailedPreconditionError(absl::StrCat(request->name(), ": its content ", request->sha256().substr(0, 64), " has not been uploaded"));
    if (*size == 0) return absl::InvalidArgumentError(absl::StrCat(request->name(), ": the file is empty; a dataset needs at least one row"));
    v1::Dataset dataset;
    dataset.set_id(absl::StrCat("ds-", request->sha256().substr(0, 16)));
    dataset.set_name(request->name());
    dataset.set_sha256(request->sha256());
    dataset.set_size_bytes(*size);
    *dataset.mutable_create_time() = google::protobuf::util::TimeUtil::GetCurrentTime();
    return controller_->Run([&, dataset](JobStore& store) -> absl::StatusOr<v1::Dataset> {
      const std::string payload = PayloadSha256(*request);
      PPFT_ASSIGN_OR_RETURN(const auto first, store.FindRequest("CreateDataset", request->request_id(), payload));
      if (first) return store.GetDataset(*first);
      if (!blobs_->Touch(dataset.sha256())) return absl::FailedPreconditionError(absl::StrCat(request->name(), ": its content has gone; upload it again"));
      PPFT_RETURN_IF_ERROR(store.PutBlob({dataset.sha256(), dataset.size_bytes(), absl::Now()}));
      PPFT_RETURN_IF_ERROR(store.PutDataset(dataset));
      PPFT_RETURN_IF_ERROR(store.PutRequest("CreateDataset", request->request_id(), payload, dataset.id()));
      PPFT_ASSIGN_OR_RETURN(const v1::Dataset stored, store.GetDataset(dataset.id()));
      if (stored.sha256() != dataset.sha256()) return absl::InternalError(absl::StrCat("two contents have the id ", dataset.id()));
      return stored;
    });
  };
  return Reply(create(), response);
}

grpc::Status DatasetServiceImpl::GetDataset(grpc::ServerContext*, const v1::GetDatasetRequest* request, v1::Dataset* response) {
  return Reply(controller_->Run([request](JobStore& store) { return FindDataset(store, request->id()); }), response);
}

grpc::Status DatasetServiceImpl::ListDatasets(grpc::ServerContext*, const v1::ListDatasetsRequest* request, v1::ListDatasetsResponse* response) {
  const auto rows = PageRows(request->page_size());
  if (!rows.ok()) return Reply(rows.status());
  auto page = controller_->Run([&](JobStore& store) { return store.ListDatasets({*rows + 1, request->page_token()}); });
  if (!page.ok()) return Reply(page.status());
  if (static_cast<int>(page->size()) > *rows) {
    page->pop_back();
    response->set_next_page_token(page->back().id());
  }
  for (v1::Dataset& dataset : *page) *response->add_datasets() = std::move(dataset);
  return grpc::Status::OK;
}

grpc::Status DatasetServiceImpl::DeleteDataset(grpc::ServerContext*, const v1::DeleteDatasetRequest*, v1::DeleteDatasetResponse*) {
  return NotYet("deleting datasets");
}

grpc::Status DatasetServiceImpl::InspectDataset(grpc::ServerContext*, const v1::InspectDatasetRequest*, v1::InspectDatasetResponse*) {
  return NotYet("inspecting datasets");
}

grpc::Status DatasetServiceImpl::PreviewDataset(grpc::ServerContext* context, const v1::PreviewDatasetRequest* request, v1::PreviewDatasetResponse* response) {
  const auto preview = [&]() -> absl::StatusOr<v1::PreviewDatasetResponse> {
    if (request->num_rows() < 1 || request->num_rows() > kMaxPreviewRows) {
      return absl::InvalidArgumentError(absl::StrCat("num_rows (", request->num_rows(), ") must be from 1 to ", kMaxPreviewRows));
    }
    if (request->data().datasets_size() == 0) return absl::InvalidArgumentError("data.datasets: must name at least one dataset");
    v1::ModelRecord model;
    std::vector<v1::Dataset> datasets;
    PPFT_RETURN_IF_ERROR(controller_->Run([&](JobStore& store) -> absl::Status {
      PPFT_ASSIGN_OR_RETURN(model, store.GetModel(request->base_model()));
      for (const v1::DatasetSpec& spec : request->data().datasets()) {
        PPFT_ASSIGN_OR_RETURN(v1::Dataset dataset, FindDataset(store, spec.path()));
        datasets.push_back(std::move(dataset));
      }
      return absl::OkStatus();
    }));
    return prepare_->Preview(model, request->data(), datasets, request->num_rows(), [context] { return context->IsCancelled(); });
  };
  return Reply(preview(), response);
}

grpc::Status ModelServiceImpl::RegisterModel(grpc::ServerContext* context, const v1::RegisterModelRequest* request, v1::Model* response) {
  return Reply(models_->Register(*controller_, *request, [context] { return context->IsCancelled(); }), response);
}

grpc::Status ModelServiceImpl::ListModels(grpc::ServerContext*, const v1::ListModelsRequest* request, v1::ListModelsResponse* response) {
  const auto rows = PageRows(request->page_size());
  if (!rows.ok()) return Reply(rows.status());
  auto page = controller_->Run([&](JobStore& store) { return store.ListModels({*rows + 1, request->page_token()}); });
  if (!page.ok()) return Reply(page.status());
  if (static_cast<int>(page->size()) > *rows) {
    page->pop_back();
    response->set_next_page_token(page->back().name());
  }
  for (v1::Model& model : *page) *response->add_models() = std::move(model);
  return grpc::Status::OK;
}

grpc::Status ModelServiceImpl::GetModel(grpc::ServerContext*, const v1::GetModelRequest* request, v1::Model* response) {
  return Reply(controller_->Run([request](JobStore& store) -> absl::StatusOr<v1::Model> {
    PPFT_ASSIGN_OR_RETURN(const v1::ModelRecord record, store.GetModel(request->name()));
    return record.model();
  }),
               response);
}

absl::StatusOr<std::string> ArtifactServiceImpl::JobId(const std::string& id_or_name) {
  if (absl::StartsWith(id_or_name, "adapter-") || absl::StrContains(id_or_name, '@')) return id_or_name;
  PPFT_ASSIGN_OR_RETURN(const v1::Job job, controller_->Run([&](JobStore& store) { return find_job_(store, id_or_name); }));
  return job.id();
}

grpc::Status ArtifactServiceImpl::ListCheckpoints(grpc::ServerContext*, const v1::ListCheckpointsRequest* request, v1::ListCheckpointsResponse* response) {
  const auto job = JobId(request->job_id());
  if (!job.ok()) return Reply(job.status());
  auto list = controller_->Run([&](JobStore& store) { return store.ListCheckpoints(*job); });
  if (!list.ok()) return Reply(list.status());
  for (v1::CheckpointManifest& manifest : *list) *response->add_checkpoints() = std::move(manifest);
  return grpc::Status::OK;
}

grpc::Status ArtifactServiceImpl::ListArtifacts(grpc::ServerContext*, const v1::ListArtifactsRequest* request, v1::ListArtifactsResponse* response) {
  const auto job = JobId(request->job_id());
  if (!job.ok()) return Reply(job.status());
  auto list = controller_->Run([&](JobStore& store) { return store.ListArtifacts(*job); });
  if (!list.ok()) return Reply(list.status());
  for (v1::ArtifactManifest& manifest : *list) *response->add_artifacts() = std::move(manifest);
  return grpc::Status::OK;
}

absl::StatusOr<v1::ArtifactManifest> ArtifactServiceImpl::CheckpointArtifact(const std::string& job_id, const std::string& checkpoint) {
  int64_t step = -1;
  if (checkpoint != "best" && checkpoint != "latest" &&
      (!absl::StartsWith(checkpoint, "step:") || !absl::SimpleAtoi(checkpoint.substr(5), &step) || step < 0)) {
    return absl::InvalidArgumentError(absl::StrCat("checkpoint \"", checkpoint, "\": expected best, latest or step:N"));
  }
  v1::Job job;
  v1::ModelRecord model;
  v1::CheckpointManifest chosen;
  std::vector<v1::MetricRow> rows;
  absl::optional<v1::ArtifactManifest> made;
  PPFT_RETURN_IF_ERROR(controller_->Run([&](JobStore& store) -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(job, find_job_(store, job_id));
    PPFT_ASSIGN_OR_RETURN(const std::vector<v1::CheckpointManifest> list, store.ListCheckpoints(job_id));
    bool found = false;
    absl::Status damaged;                             // of the best, unless a newer one is
    for (const v1::CheckpointManifest& one : list) {  // by step: the newest that fits stays
      if (checkpoint == "best" ? !one.best() : checkpoint != "latest" && one.state().step() != step) continue;
      damaged = absl::OkStatus();
      if (!one.damage().empty()) {
        if (checkpoint == "latest") continue;
        damaged = absl::FailedPreconditionError(absl::StrCat(
            "the ", checkpoint == "best" ? "best checkpoint, of step " : "checkpoint of step ", one.state().step(), ", cannot be used: ", one.damage(),
            checkpoint != "best" ? ""
            : found              ? absl::StrCat("; the best one before it is had with --checkpoint step:", chosen.state().step())
                                 : std::string("; no other best one is left")));
        continue;
      }
      chosen = one;
      found = true;
    }
    PPFT_RETURN_IF_ERROR(damaged);
    if (!found) return absl::NotFoundError(absl::StrCat("the job ", job_id, " has no checkpoint \"", checkpoint, "\": see `ppctl checkpoints ", job_id, "`"));
    const auto artifact = store.GetArtifact(absl::StrCat(job_id, "@step-", chosen.state().step()), "adapter");
    if (artifact.ok()) made = *artifact;
    PPFT_ASSIGN_OR_RETURN(model, store.GetModel(job.spec().model().base_model()));
    PPFT_ASSIGN_OR_RETURN(rows, store.ListMetrics(job_id, -1, kAllMetricRows));
    return absl::OkStatus();
  }));
  // An artifact of the same step may stem from an earlier attempt; its bytes are the same, as training is deterministic.
  if (made) return *made;
  PPFT_ASSIGN_OR_RETURN(const v1::ArtifactManifest manifest, AssembleCheckpointAdapter(*blobs_, job, model, chosen, rows));
  return controller_->Run([&](JobStore& store) -> absl::StatusOr<v1::ArtifactManifest> {
    for (const v1::FileRef& file : manifest.files()) PPFT_RETURN_IF_ERROR(PutBlobRow(store, file));
    PPFT_RETURN_IF_ERROR(store.PutArtifact(manifest));
    return manifest;
  });
}

grpc::Status ArtifactServiceImpl::GetManifest(grpc::ServerContext*, const v1::GetManifestRequest* request, v1::ArtifactManifest* response) {
  const auto get = [&]() -> absl::StatusOr<v1::ArtifactManifest> {
    const std::string type = request->type().empty() ? "adapter" : request->type();
    if (type != "adapter" && type != "merged") return absl::InvalidArgumentError(absl::StrCat("type \"", type, "\": expected adapter or merged"));
    PPFT_ASSIGN_OR_RETURN(const std::string id, JobId(request->job_id()));
    if (!request->checkpoint().empty()) {
      if (type != "adapter") return absl::InvalidArgumentError("a checkpoint holds an adapter alone; ask for the type adapter");
      return CheckpointArtifact(id, request->checkpoint());
    }
    return controller_->Run([&](JobStore& store) -> absl::StatusOr<v1::ArtifactManifest> {
      auto manifest = store.GetArtifact(id, type);
      if (!absl::IsNotFound(manifest.status())) return manifest;
      const auto job = find_job_(store, id);
      if (!job.ok()) return manifest;
      if (job->status().state() == v1::JOB_STATE_SUCCEEDED) {
        return absl::NotFoundError(absl::StrCat("the job ", id, " made no artifact of the type ", type, "; output.formats says which ones it makes"));
      }
      PPFT_ASSIGN_OR_RETURN(const std::vector<v1::CheckpointManifest> checkpoints, store.ListCheckpoints(id));
      const bool usable = std::any_of(checkpoints.begin(), checkpoints.end(), [](const v1::CheckpointManifest& one) { return one.damage().empty(); });
      return absl::FailedPreconditionError(absl::StrCat("the job ", id, " has no final model: it is ", v1::JobState_Name(job->status().state()).substr(10),
                                                        usable ? "; a checkpoint can be fetched with --checkpoint latest" : " and has no checkpoint"));
    });
  };
  return Reply(get(), response);
}

grpc::Status ArtifactServiceImpl::Download(grpc::ServerContext* context, const v1::DownloadRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) {
  const auto check = [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::string id, JobId(request->artifact_id()));
    return controller_->Run([&](JobStore& store) -> absl::Status {
      for (const char* type : {"adapter", "merged"}) {
        const auto manifest = store.GetArtifact(id, type);
        if (!manifest.ok()) continue;
        for (const v1::FileRef& file : manifest->files()) {
          if (file.sha256() == request->sha256()) return absl::OkStatus();
        }
      }
      return absl::NotFoundError(absl::StrCat("no file with the content ", request->sha256().substr(0, 64), " in the artifact ", request->artifact_id()));
    });
  };
  absl::Status status = check();
  if (!status.ok()) return Reply(status);
  const auto range = OpenBlobRange(*blobs_, request->sha256());
  if (!range.ok()) return Reply(range.status());
  return Reply(SendRange(*range, request->offset(), context, writer));
}

grpc::Status ArtifactServiceImpl::CreateAdapter(grpc::ServerContext*, const v1::CreateAdapterRequest* request, v1::ArtifactManifest* response) {
  const auto create = [&]() -> absl::StatusOr<v1::ArtifactManifest> {
    PPFT_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
    PPFT_ASSIGN_OR_RETURN(const v1::ArtifactManifest manifest, MakeUploadedAdapter(*blobs_, {request->files().begin(), request->files().end()}));
    return controller_->Run([&](JobStore& store) -> absl::StatusOr<v1::ArtifactManifest> {
      const std::string payload = PayloadSha256(*request);
      PPFT_ASSIGN_OR_RETURN(const auto first, store.FindRequest("CreateAdapter", request->request_id(), payload));
      if (first) return store.GetArtifact(*first, "adapter");
      const auto existing = store.GetArtifact(manifest.id(), "adapter");
      if (!existing.ok()) {
        for (const v1::FileRef& file : manifest.files()) PPFT_RETURN_IF_ERROR(PutBlobRow(store, file));
        PPFT_RETURN_IF_ERROR(store.PutArtifact(manifest));
      }
      PPFT_RETURN_IF_ERROR(store.PutRequest("CreateAdapter", request->request_id(), payload, manifest.id()));
      return existing.ok() ? *existing : manifest;
    });
  };
  return Reply(create(), response);
}

grpc::Status WorkerFilesImpl::FetchFile(grpc::ServerContext* context, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) {
  if (request->check() || !blobs_->Find(request->sha256())) {
    absl::Status status = blobs_->Verify(request->sha256());
    if (absl::IsDataLoss(status)) {
      LogError(status.message());
      net::SetErrorInfo(&status, {"CONTENT_DAMAGED", {}});
      return Reply(status);
    }
  }
  auto range = OpenBlobRange(*blobs_, request->sha256());
  absl::Status absent = range.status();
  if (absl::IsNotFound(absent) || absl::IsUnavailable(absent)) {
    range = models_->OpenTensor(request->sha256(), request->check());
    if (absl::IsNotFound(range.status())) {
      // Not UNAVAILABLE on the wire: workers would wait for it, and nobody would be told.
      if (absl::IsUnavailable(absent)) absent = absl::FailedPreconditionError(absent.message());
      net::SetErrorInfo(&absent, {absl::IsNotFound(absent) ? "CONTENT_MISSING" : "STORE_UNREADABLE", {}});
      LogError(absent.message());
      return Reply(absent);
    }
  }
  if (!range.ok()) return Reply(range.status());
  return Reply(SendRange(*range, request->offset(), context, writer));
}

grpc::Status WorkerFilesImpl::PutFile(grpc::ServerContext* context, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) {
  v1::PutFileRequest request;
  if (!reader->Read(&request) || !request.has_header()) return Reply(absl::InvalidArgumentError("the first message must be a header"));
  const v1::PutFileRequest::Header header = request.header();
  const std::string key = absl::StrCat(header.rank().job_id(), ".", header.rank().epoch(), ".", header.rank().rank(), ".", header.file().sha256());
  const auto put = [&]() -> absl::Status {
    PPFT_RETURN_IF_ERROR(controller_->CheckEpoch(header.rank()));
    absl::Status received;
    {
      PPFT_ASSIGN_OR_RETURN(const auto upload, blobs_->StartUpload(key, header.file().sha256(), header.file().size_bytes(), header.offset()));
      received = Receive(*upload, DataOf(context, reader, &request));
      // Agents begin again at the start: what is left of this try only takes room.
      if (!received.ok()) blobs_->DropPartial(key);
    }
    PPFT_RETURN_IF_ERROR(received);
    // Given up meanwhile: the bytes lie there by their content, and nothing will ever name them for this epoch.
    PPFT_RETURN_IF_ERROR(controller_->CheckEpoch(header.rank()));
    return controller_->Run([&](JobStore& store) { return PutUploadedRow(store, *blobs_, header.file()); });
  };
  const absl::Status status = put();
  if (absl::IsResourceExhausted(status)) {
    controller_->ReportDiskFull(
        header.rank(), header.file().size_bytes() + blobs_->reserve_bytes(),
        absl::StrCat("the coordinator's disk has no room for a file of ", header.file().size_bytes(), " bytes from rank ", header.rank().rank(), ": ",
                     blobs_->data_dir(), " has ", blobs_->FreeBytes(), " bytes free, ", blobs_->reserve_bytes(), " stay reserved"));
  }
  response->set_received_bytes(header.file().size_bytes());
  return Reply(status);
}

}  // namespace ppft::coordinator
