// The gRPC faces of this room: translate, call, reply. Synchronous handlers; many threads at once.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/model_registry.h"
#include "coordinator/artifacts/prepare_runner.h"
#include "coordinator/controller.h"
#include "coordinator/service/worker_files.h"
#include "ppft/v1/artifact.grpc.pb.h"
#include "ppft/v1/blob.grpc.pb.h"
#include "ppft/v1/dataset.grpc.pb.h"
#include "ppft/v1/model.grpc.pb.h"

namespace ppft::coordinator {

// A job by id, or by a name that only one job has; NOT_FOUND. Called in a controller's body.
using JobLookup = std::function<absl::StatusOr<v1::Job>(JobStore& store, const std::string& id_or_name)>;

class BlobServiceImpl : public v1::BlobService::Service {
 public:
  BlobServiceImpl(BlobStore* blobs, Controller* controller) : blobs_(blobs), controller_(controller) {}
  grpc::Status GetBlob(grpc::ServerContext* context, const v1::GetBlobRequest* request, v1::GetBlobResponse* response) override;
  grpc::Status UploadBlob(grpc::ServerContext* context, grpc::ServerReader<v1::UploadBlobRequest>* reader, v1::UploadBlobResponse* response) override;

 private:
  BlobStore* const blobs_;
  Controller* const controller_;
};

class DatasetServiceImpl : public v1::DatasetService::Service {
 public:
  DatasetServiceImpl(BlobStore* blobs, PrepareRunner* prepare, Controller* controller) : blobs_(blobs), prepare_(prepare), controller_(controller) {}
  grpc::Status CreateDataset(grpc::ServerContext* context, const v1::CreateDatasetRequest* request, v1::Dataset* response) override;
  grpc::Status GetDataset(grpc::ServerContext* context, const v1::GetDatasetRequest* request, v1::Dataset* response) override;
  grpc::Status ListDatasets(grpc::ServerContext* context, const v1::ListDatasetsRequest* request, v1::ListDatasetsResponse* response) override;
  grpc::Status DeleteDataset(grpc::ServerContext* context, const v1::DeleteDatasetRequest* request, v1::DeleteDatasetResponse* response) override;
  grpc::Status PreviewDataset(grpc::ServerContext* context, const v1::PreviewDatasetRequest* request, v1::PreviewDatasetResponse* response) override;
  grpc::Status InspectDataset(grpc::ServerContext* context, const v1::InspectDatasetRequest* request, v1::InspectDatasetResponse* response) override;

 private:
  BlobStore* const blobs_;
  PrepareRunner* const prepare_;
  Controller* const controller_;
};

class ModelServiceImpl : public v1::ModelService::Service {
 public:
  ModelServiceImpl(ModelRegistry* models, Controller* controller) : models_(models), controller_(controller) {}
  grpc::Status RegisterModel(grpc::ServerContext* context, const v1::RegisterModelRequest* request, v1::Model* response) override;
  grpc::Status ListModels(grpc::ServerContext* context, const v1::ListModelsRequest* request, v1::ListModelsResponse* response) override;
  grpc::Status GetModel(grpc::ServerContext* context, const v1::GetModelRequest* request, v1::Model* response) override;

 private:
  ModelRegistry* const models_;
  Controller* const controller_;
};

class ArtifactServiceImpl : public v1::ArtifactService::Service {
 public:
  ArtifactServiceImpl(BlobStore* blobs, Controller* controller, JobLookup find_job) : blobs_(blobs), controller_(controller), find_job_(std::move(find_job)) {}
  grpc::Status ListCheckpoints(grpc::ServerContext* context, const v1::ListCheckpointsRequest* request, v1::ListCheckpointsResponse* response) override;
  grpc::Status ListArtifacts(grpc::ServerContext* context, const v1::ListArtifactsRequest* request, v1::ListArtifactsResponse* response) override;
  grpc::Status GetManifest(grpc::ServerContext* context, const v1::GetManifestRequest* request, v1::ArtifactManifest* response) override;
  grpc::Status Download(grpc::ServerContext* context, const v1::DownloadRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) override;
  grpc::Status CreateAdapter(grpc::ServerContext* context, const v1::CreateAdapterRequest* request, v1::ArtifactManifest* response) override;

 private:
  absl::StatusOr<v1::ArtifactManifest> CheckpointArtifact(const std::string& job_id, const std::string& checkpoint);
  // The id of a job given by id or name. Other ids (uploaded adapters) stay as they are.
  absl::StatusOr<std::string> JobId(const std::string& id_or_name);

  BlobStore* const blobs_;
  Controller* const controller_;
  const JobLookup find_job_;
};

class WorkerFilesImpl : public WorkerFiles {
 public:
  WorkerFilesImpl(BlobStore* blobs, ModelRegistry* models, Controller* controller) : blobs_(blobs), models_(models), controller_(controller) {}
  grpc::Status FetchFile(grpc::ServerContext* context, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) override;
  // An upload under (job, epoch, rank, content), so that a zombie of an old epoch never meets its successor's. OK means that the whole file lies
  // checked on disk; header.offset may be anything up to what an earlier call sent.
  grpc::Status PutFile(grpc::ServerContext* context, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) override;

 private:
  BlobStore* const blobs_;
  ModelRegistry* const models_;
  Controller* const controller_;
};

}  // namespace ppft::coordinator
