// ModelService. Synchronous handlers; many threads at once.
#pragma once

#include <grpcpp/grpcpp.h>

#include "coordinator/artifacts/model_registry.h"
#include "coordinator/controller.h"
#include "ppft/v1/model.grpc.pb.h"

namespace ppft::coordinator {

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

}  // namespace ppft::coordinator
