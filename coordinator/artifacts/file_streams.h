// File bytes over gRPC streams, the server's side: chunks of at most 1 MiB out, uploads in. Blocking; on gRPC's threads.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/sync_stream.h>

#include <functional>

#include "absl/status/status.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/model_registry.h"
#include "ppft/v1/file.pb.h"

namespace ppft::coordinator {

// The whole blob as a range.
absl::StatusOr<FileRange> OpenBlobRange(const BlobStore& blobs, const std::string& sha256);

// Sends the range from `offset` (within the range) to its end. CANCELLED when the client has gone; OUT_OF_RANGE for an offset that is not there.
absl::Status SendRange(const FileRange& range, int64_t offset, grpc::ServerContext* context, grpc::ServerWriter<v1::FileChunk>* writer);

}  // namespace ppft::coordinator
