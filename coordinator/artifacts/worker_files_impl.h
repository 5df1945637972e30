// The files that workers fetch and put. Synchronous handlers; many threads at once.
#pragma once

#include <grpcpp/grpcpp.h>

#include <utility>

#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/artifacts/model_registry.h"
#include "coordinator/controller.h"
#include "coordinator/service/worker_files.h"

namespace ppft::coordinator {

class WorkerFilesImpl : public WorkerFiles {
 public:
  WorkerFilesImpl(BlobStore* blobs, ModelRegistry* models, Controller* controller, CountBytes count)
      : blobs_(blobs), models_(models), controller_(controller), count_(std::move(count)) {}
  grpc::Status FetchFile(grpc::ServerContext* context, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) override;
  // An upload under (job, epoch, rank, content), so that a zombie of an old epoch never meets its successor's. OK means that the whole file lies
  // checked on disk; header.offset may be anything up to what an earlier call sent.
  grpc::Status PutFile(grpc::ServerContext* context, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) override;

 private:
  BlobStore* const blobs_;
  ModelRegistry* const models_;
  Controller* const controller_;
  const CountBytes count_;
};

}  // namespace ppft::coordinator
