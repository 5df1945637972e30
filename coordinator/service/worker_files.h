// The file half of WorkerService: coordinator/artifacts implements it, coordinator/service serves it beside Connect.
#pragma once

#include "ppft/v1/worker.grpc.pb.h"

namespace ppft::coordinator {

// Called on gRPC's threads, many at once; may block.
class WorkerFiles {
 public:
  virtual ~WorkerFiles() = default;
  virtual grpc::Status FetchFile(grpc::ServerContext* context, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) = 0;
  virtual grpc::Status PutFile(grpc::ServerContext* context, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) = 0;
};

}  // namespace ppft::coordinator
