// BlobService: uploads by content. Synchronous handlers; many threads at once.
#pragma once

#include <grpcpp/grpcpp.h>

#include <utility>

#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/controller.h"
#include "ppft/v1/blob.grpc.pb.h"

namespace ppft::coordinator {

class BlobServiceImpl : public v1::BlobService::Service {
 public:
  BlobServiceImpl(BlobStore* blobs, Controller* controller, CountBytes count) : blobs_(blobs), controller_(controller), count_(std::move(count)) {}
  grpc::Status GetBlob(grpc::ServerContext* context, const v1::GetBlobRequest* request, v1::GetBlobResponse* response) override;
  grpc::Status UploadBlob(grpc::ServerContext* context, grpc::ServerReader<v1::UploadBlobRequest>* reader, v1::UploadBlobResponse* response) override;

 private:
  BlobStore* const blobs_;
  Controller* const controller_;
  const CountBytes count_;
};

}  // namespace ppft::coordinator
