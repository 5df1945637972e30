// DatasetService. Synchronous handlers; many threads at once.
#pragma once

#include <grpcpp/grpcpp.h>

#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/prepare_runner.h"
#include "coordinator/controller.h"
#include "ppft/v1/dataset.grpc.pb.h"

namespace ppft::coordinator {

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

}  // namespace ppft::coordinator
