#include "coordinator/service/cluster_service.h"

#include <sys/statvfs.h>

#include "absl/time/clock.h"
#include "coordinator/core/job_state.h"
#include "coordinator/service/answer.h"

namespace ppft::coordinator {

ClusterServiceImpl::ClusterServiceImpl(JobController* controller, std::string version, std::string data_dir)
    : controller_(controller), version_(std::move(version)), data_dir_(std::move(data_dir)), start_seconds_(absl::ToUnixSeconds(absl::Now())) {}

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

grpc::ServerUnaryReactor* ClusterServiceImpl::DrainWorker(grpc::CallbackServerContext* context, const v1::DrainWorkerRequest* request, v1::Worker* response) {
  return AnswerNotYet(context, "draining a worker");
}
grpc::ServerUnaryReactor* ClusterServiceImpl::UncordonWorker(grpc::CallbackServerContext* context, const v1::UncordonWorkerRequest* request,
                                                             v1::Worker* response) {
  return AnswerNotYet(context, "uncordoning a worker");
}

}  // namespace ppft::coordinator
