// WorkerService: Connect as one reactor per stream, the file calls passed on to WorkerFiles.
#pragma once

#include "coordinator/job_controller.h"
#include "coordinator/service/worker_files.h"
#include "ppft/v1/worker.grpc.pb.h"

namespace ppft::coordinator {

class WorkerServiceImpl final : public v1::WorkerService::WithCallbackMethod_Connect<v1::WorkerService::Service> {
 public:
  // `files` outlives the service.
  WorkerServiceImpl(JobController* controller, WorkerFiles* files) : controller_(controller), files_(files) {}

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* Connect(grpc::CallbackServerContext* context) override;
  grpc::Status FetchFile(grpc::ServerContext* context, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) override {
    return files_->FetchFile(context, request, writer);
  }
  grpc::Status PutFile(grpc::ServerContext* context, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) override {
    return files_->PutFile(context, reader, response);
  }

 private:
  JobController* const controller_;
  WorkerFiles* const files_;
};

}  // namespace ppft::coordinator
