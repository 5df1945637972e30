// Artifacts: all of this room in one object. Files on disk, datasets, models, artifacts; the slow work of jobs; and the gRPC services on them.
//
//   auto artifacts = Artifacts::Open(options);            // creates the folders
//   controller = …(artifacts->work()) …                   // JobWork: prepare, assemble
//   artifacts->Attach(controller, find_job);              // before serving: loads the models
//   for (grpc::Service* s : artifacts->services()) builder.RegisterService(s);
//   WorkerService … artifacts->worker_files()
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/blob_sweep.h"
#include "coordinator/artifacts/disk_guard.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/artifacts/model_registry.h"
#include "coordinator/artifacts/prepare_runner.h"
#include "coordinator/controller.h"
#include "coordinator/service/worker_files.h"
#include "ppft/v1/cluster.pb.h"

namespace ppft::coordinator {

struct ArtifactsOptions {
  std::string data_dir;
  std::vector<std::string> model_roots;
  std::string prepare_binary;  // path of ppft-prepare
  int64_t reserve_bytes = BlobStore::kReserveBytes;
  SweepLimits sweep;
  CountBytes count_bytes = [](const char*, int64_t) {};
};

class Artifacts {
 public:
  static absl::StatusOr<std::unique_ptr<Artifacts>> Open(const ArtifactsOptions& options);
  ~Artifacts();

  // The controller must outlive the services' last call. `find_job` finds a job by id or unique name, in a controller's body. Blocks: not on the
  // controller's thread.
  absl::Status Attach(Controller* controller, std::function<absl::StatusOr<v1::Job>(JobStore& store, const std::string& id_or_name)> find_job);

  // Ends what runs in the background; before the controller stops.
  void Detach();

  JobWork* work();
  WorkerFiles* worker_files();
  // BlobService, DatasetService, ModelService, ArtifactService: synchronous, for many threads.
  std::vector<grpc::Service*> services();
  BlobStore& blobs() { return *blobs_; }

  // May the adapter named by spec.model.init_adapter start this job? OK without one. Reads small files; from any thread.
  absl::Status CheckInitAdapter(const v1::ArtifactManifest& adapter, const v1::ModelRecord& model, const v1::AdapterSpec& spec) const;

  // ModelRegistry::CheckUnchanged.
  absl::Status CheckModel(const v1::ModelRecord& model) const { return models_->CheckUnchanged(model); }

  // Are the files of these still there, with their sizes, and with `contents` with their bytes? May read for long.
  v1::CheckFilesResponse CheckFiles(const std::vector<v1::ModelRecord>& models, const std::vector<v1::Dataset>& datasets, bool contents) const;

 private:
  struct Parts;
  Artifacts();

  SweepLimits sweep_limits_;
  CountBytes count_bytes_;
  std::unique_ptr<BlobStore> blobs_;
  std::unique_ptr<DiskGuard> disk_;  // of the controller's thread, through work_
  std::unique_ptr<PrepareRunner> prepare_;
  std::unique_ptr<ModelRegistry> models_;
  std::unique_ptr<Parts> parts_;  // services, made by Attach
  std::unique_ptr<JobWork> work_;
  std::unique_ptr<BlobSweep> sweep_;  // made by Attach
};

}  // namespace ppft::coordinator
