// ClusterService over the controller.
#pragma once

#include <string>

#include "coordinator/job_controller.h"
#include "ppft/v1/cluster.grpc.pb.h"

namespace ppft::coordinator {

class ClusterServiceImpl final : public v1::ClusterService::CallbackService {
 public:
  ClusterServiceImpl(JobController* controller, std::string version, std::string data_dir);

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request, v1::GetStatusResponse* response) override;
  grpc::ServerUnaryReactor* ListWorkers(grpc::CallbackServerContext* context, const v1::ListWorkersRequest* request,
                                        v1::ListWorkersResponse* response) override;
  grpc::ServerUnaryReactor* DrainWorker(grpc::CallbackServerContext* context, const v1::DrainWorkerRequest* request, v1::Worker* response) override;
  grpc::ServerUnaryReactor* UncordonWorker(grpc::CallbackServerContext* context, const v1::UncordonWorkerRequest* request, v1::Worker* response) override;

 private:
  JobController* const controller_;
  const std::string version_;
  const std::string data_dir_;
  const int64_t start_seconds_;
};

}  // namespace ppft::coordinator
