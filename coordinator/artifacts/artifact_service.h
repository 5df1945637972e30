// ArtifactService: checkpoints, artifacts and their files, uploaded adapters. Synchronous handlers; many threads at once.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/controller.h"
#include "ppft/v1/artifact.grpc.pb.h"

namespace ppft::coordinator {

// A job by id, or by a name that only one job has; NOT_FOUND. Called in a controller's body.
using JobLookup = std::function<absl::StatusOr<v1::Job>(JobStore& store, const std::string& id_or_name)>;

class ArtifactServiceImpl : public v1::ArtifactService::Service {
 public:
  ArtifactServiceImpl(BlobStore* blobs, Controller* controller, JobLookup find_job, CountBytes count)
      : blobs_(blobs), controller_(controller), find_job_(std::move(find_job)), count_(std::move(count)) {}
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
  const CountBytes count_;
};

}  // namespace ppft::coordinator
