#include "coordinator/artifacts/artifacts.h"

#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "coordinator/artifacts/artifact_service.h"
#include "coordinator/artifacts/assembly.h"
#include "coordinator/artifacts/blob_service.h"
#include "coordinator/artifacts/dataset_service.h"
#include "coordinator/artifacts/file_check.h"
#include "coordinator/artifacts/model_service.h"
#include "coordinator/artifacts/worker_files_impl.h"

namespace ppft::coordinator {
namespace {

class ArtifactWork : public JobWork {
 public:
  ArtifactWork(BlobStore* blobs, PrepareRunner* prepare, DiskGuard* disk) : blobs_(blobs), prepare_(prepare), disk_(disk) {}

  absl::StatusOr<v1::PreparedData> Prepare(const PrepareInput& input, const std::function<bool()>& cancelled) override {
    return prepare_->Prepare(input, cancelled);
  }
  absl::StatusOr<std::vector<v1::ArtifactManifest>> Assemble(const AssembleInput& input) override { return AssembleArtifacts(*blobs_, input); }
  void DeleteBlobs(const std::vector<std::string>& sha256s) override {
    for (const std::string& sha256 : sha256s) {
      const absl::Status status = blobs_->Delete(sha256);
      if (!status.ok()) LogWarning("a file that nothing names stays: ", std::string(status.message()));
    }
  }
  absl::Status CheckBlobs(const std::vector<std::string>& sha256s) override {
    for (const std::string& sha256 : sha256s) PPFT_RETURN_IF_ERROR(blobs_->Verify(sha256));
    return absl::OkStatus();
  }
  DiskRoom LookAtDisk() override { return disk_->Look(); }
  void GiveUpBallast() override { disk_->GiveUpBallast(); }

 private:
  BlobStore* const blobs_;
  PrepareRunner* const prepare_;
  DiskGuard* const disk_;
};

}  // namespace

struct Artifacts::Parts {
  Parts(BlobStore* blobs, PrepareRunner* prepare, ModelRegistry* models, Controller* controller, JobLookup find_job, const CountBytes& count)
      : blob_service(blobs, controller, count),
        dataset_service(blobs, prepare, controller),
        model_service(models, controller),
        artifact_service(blobs, controller, std::move(find_job), count),
        worker_files(blobs, models, controller, count) {}

  BlobServiceImpl blob_service;
  DatasetServiceImpl dataset_service;
  ModelServiceImpl model_service;
  ArtifactServiceImpl artifact_service;
  WorkerFilesImpl worker_files;
};

Artifacts::Artifacts() = default;
Artifacts::~Artifacts() = default;

absl::StatusOr<std::unique_ptr<Artifacts>> Artifacts::Open(const ArtifactsOptions& options) {
  std::unique_ptr<Artifacts> out(new Artifacts());
  out->sweep_limits_ = options.sweep;
  out->count_bytes_ = options.count_bytes;
  PPFT_RETURN_IF_ERROR(MakeDirs(options.data_dir));
  std::error_code error;
  // Paths below are compared and stored: one spelling for all of them.
  const std::string data_dir = std::filesystem::canonical(options.data_dir, error).string();
  if (error) return ErrnoStatus(error.value(), options.data_dir);
  PPFT_ASSIGN_OR_RETURN(out->blobs_, BlobStore::Open(data_dir, options.reserve_bytes));
  out->disk_ = std::make_unique<DiskGuard>(data_dir, out->blobs_->reserve_bytes());
  out->disk_->Look();
  out->prepare_ = std::make_unique<PrepareRunner>(out->blobs_.get(), options.prepare_binary);
  out->models_ = std::make_unique<ModelRegistry>(out->blobs_.get(), out->prepare_.get(), options.model_roots);
  out->work_ = std::make_unique<ArtifactWork>(out->blobs_.get(), out->prepare_.get(), out->disk_.get());
  return out;
}

absl::Status Artifacts::Attach(Controller* controller, std::function<absl::StatusOr<v1::Job>(JobStore& store, const std::string& id_or_name)> find_job) {
  PPFT_RETURN_IF_ERROR(models_->Load(*controller));
  parts_ = std::make_unique<Parts>(blobs_.get(), prepare_.get(), models_.get(), controller, std::move(find_job), count_bytes_);
  sweep_ = std::make_unique<BlobSweep>(blobs_.get(), controller, sweep_limits_);
  return absl::OkStatus();
}

void Artifacts::Detach() { sweep_.reset(); }

JobWork* Artifacts::work() { return work_.get(); }

WorkerFiles* Artifacts::worker_files() { return &parts_->worker_files; }

std::vector<grpc::Service*> Artifacts::services() {
  return {&parts_->blob_service, &parts_->dataset_service, &parts_->model_service, &parts_->artifact_service};
}

absl::Status Artifacts::CheckInitAdapter(const v1::ArtifactManifest& adapter, const v1::ModelRecord& model, const v1::AdapterSpec& spec) const {
  return coordinator::CheckInitAdapter(*blobs_, adapter, model, spec);
}

v1::CheckFilesResponse Artifacts::CheckFiles(const std::vector<v1::ModelRecord>& models, const std::vector<v1::Dataset>& datasets, bool contents) const {
  FileCheckup checkup(*blobs_, models_->roots(), contents);
  for (const v1::ModelRecord& model : models) checkup.Add(model);
  for (const v1::Dataset& dataset : datasets) checkup.Add(dataset);
  return checkup.result();
}

}  // namespace ppft::coordinator
