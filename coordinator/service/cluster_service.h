// ClusterService over the controller.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "coordinator/job_controller.h"
#include "ppft/v1/cluster.grpc.pb.h"

namespace ppft::coordinator {

// Looks at the files of these models and datasets; on a thread of the pool.
using FileCheck = std::function<v1::CheckFilesResponse(const std::vector<v1::ModelRecord>& models, const std::vector<v1::Dataset>& datasets, bool contents)>;

class ClusterServiceImpl final : public v1::ClusterService::CallbackService {
 public:
  ClusterServiceImpl(JobController* controller, std::string version, std::string data_dir, FileCheck check_files);

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request, v1::GetStatusResponse* response) override;
  grpc::ServerUnaryReactor* ListWorkers(grpc::CallbackServerContext* context, const v1::ListWorkersRequest* request,
                                        v1::ListWorkersResponse* response) override;
  grpc::ServerUnaryReactor* CheckFiles(grpc::CallbackServerContext* context, const v1::CheckFilesRequest* request, v1::CheckFilesResponse* response) override;
  grpc::ServerUnaryReactor* DrainWorker(grpc::CallbackServerContext* context, const v1::DrainWorkerRequest* request, v1::Worker* response) override;
  grpc::ServerUnaryReactor* UncordonWorker(grpc::CallbackServerContext* context, const v1::UncordonWorkerRequest* request, v1::Worker* response) override;

 private:
  JobController* const controller_;
  const std::string version_;
  const std::string data_dir_;
  const FileCheck check_files_;
  const int64_t start_seconds_;
};

}  // namespace ppft::coordinator
