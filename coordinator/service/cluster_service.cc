#include "coordinator/service/cluster_service.h"

#include <sys/statvfs.h>

#include "absl/time/clock.h"
#include "common/base/proto_time.h"
#include "common/base/status.h"
#include "coordinator/core/job_state.h"
#include "coordinator/service/answer.h"

namespace ppft::coordinator {
namespace {

constexpr int kPageRows = 500;

}  // namespace

ClusterServiceImpl::ClusterServiceImpl(JobController* controller, std::string version, std::string data_dir, FileCheck check_files)
    : controller_(controller),
      version_(std::move(version)),
      data_dir_(std::move(data_dir)),
      check_files_(std::move(check_files)),
      start_seconds_(absl::ToUnixSeconds(absl::Now())) {}

grpc::ServerUnaryReactor* ClusterServiceImpl::GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request,
                                                        v1::GetStatusResponse* response) {
  return AnswerAfterCommit(context, controller_, [this, response](JobStore&) -> absl::Status {
    int devices = 0, devices_free = 0, workers = 0;
    controller_->DeviceCounts(&devices, &devices_free);
    for (const v1::Worker& worker : controller_->Workers()) workers += worker.state() == "ready" ? 1 : 0;
    response->set_version(version_);
    response->mutable_start_time()->set_seconds(start_seconds_);
    response->set_num_workers(workers);
    response->set_num_devices(devices);
    response->set_num_devices_free(devices_free);
    for (const v1::JobRecord* record : controller_->NewestJobs()) ++(*response->mutable_jobs())[StateWord(record->job().status().state())];
    struct statvfs disk;
    if (statvfs(data_dir_.c_str(), &disk) == 0) response->set_data_bytes_free(static_cast<int64_t>(disk.f_bavail) * static_cast<int64_t>(disk.f_frsize));
    response->set_data_dir(data_dir_);
    SetTime(absl::Now(), response->mutable_time());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ClusterServiceImpl::ListWorkers(grpc::CallbackServerContext* context, const v1::ListWorkersRequest* request,
                                                          v1::ListWorkersResponse* response) {
  return AnswerAfterCommit(context, controller_, [this, response](JobStore&) -> absl::Status {
    for (v1::Worker& worker : controller_->Workers()) *response->add_workers() = std::move(worker);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ClusterServiceImpl::CheckFiles(grpc::CallbackServerContext* context, const v1::CheckFilesRequest* request,
                                                         v1::CheckFilesResponse* response) {
  return AnswerFromPool(context, controller_, [this, request, response]() -> absl::Status {
    struct Registered {
      std::vector<v1::ModelRecord> models;
      std::vector<v1::Dataset> datasets;
    };
    PPFT_ASSIGN_OR_RETURN(const Registered all, controller_->Run([](JobStore& store) -> absl::StatusOr<Registered> {
      Registered found;
      Page page{kPageRows, ""};
      for (bool more = true; more;) {
        PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Model> models, store.ListModels(page));
        for (const v1::Model& model : models) {
          PPFT_ASSIGN_OR_RETURN(v1::ModelRecord record, store.GetModel(model.name()));
          found.models.push_back(std::move(record));
          page.after = model.name();
        }
        more = models.size() == kPageRows;
      }
      page.after.clear();
      for (bool more = true; more;) {
        PPFT_ASSIGN_OR_RETURN(std::vector<v1::Dataset> datasets, store.ListDatasets(page));
        more = datasets.size() == kPageRows;
        for (v1::Dataset& dataset : datasets) {
          page.after = dataset.id();
          found.datasets.push_back(std::move(dataset));
        }
      }
      return found;
    }));
    *response = check_files_(all.models, all.datasets, request->contents());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ClusterServiceImpl::DrainWorker(grpc::CallbackServerContext* context, const v1::DrainWorkerRequest* request, v1::Worker* response) {
  return AnswerNotYet(context, "draining a worker");
}
grpc::ServerUnaryReactor* ClusterServiceImpl::UncordonWorker(grpc::CallbackServerContext* context, const v1::UncordonWorkerRequest* request,
                                                             v1::Worker* response) {
  return AnswerNotYet(context, "uncordoning a worker");
}

}  // namespace ppft::coordinator
