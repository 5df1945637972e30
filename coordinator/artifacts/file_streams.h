// File bytes over gRPC streams, the server's side: chunks of at most 1 MiB out, uploads in. Blocking; on gRPC's threads.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/sync_stream.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/model_registry.h"
#include "coordinator/store/job_store.h"
#include "ppft/v1/file.pb.h"

namespace ppft::coordinator {

// Is told of bytes as they move; `direction`: upload | download. From any thread.
using CountBytes = std::function<void(const char* direction, int64_t bytes)>;

// The whole blob as a range.
absl::StatusOr<FileRange> OpenBlobRange(const BlobStore& blobs, const std::string& sha256);

// Sends the range from `offset` (within the range) to its end. CANCELLED when the client has gone; OUT_OF_RANGE for an offset that is not there.
absl::Status SendRange(const FileRange& range, int64_t offset, grpc::ServerContext* context, grpc::ServerWriter<v1::FileChunk>* writer,
                       const CountBytes& count);

// Appends what `next` gives, the next message's data or nullptr at the end of the stream, and commits. INVALID_ARGUMENT for a chunk that is too large;
// else what `next` and the upload say.
absl::Status Receive(BlobStore::Upload& upload, const std::function<absl::StatusOr<const std::string*>()>& next, const CountBytes& count);

// For Receive: the data of the messages behind a stream's header, read into `request`. CANCELLED when the client has gone.
template <typename Request>
std::function<absl::StatusOr<const std::string*>()> DataOf(grpc::ServerContext* context, grpc::ServerReader<Request>* reader, Request* request) {
  return [=]() -> absl::StatusOr<const std::string*> {
    if (!reader->Read(request)) {
      if (context->IsCancelled()) return absl::CancelledError("the client has gone");
      return static_cast<const std::string*>(nullptr);
    }
    if (!request->has_data()) return absl::InvalidArgumentError("after the header only data may follow");
    return &request->data();
  };
}

// Of a file that was just uploaded. On the controller's thread, where files that nothing names go; ABORTED when this one has gone.
absl::Status PutUploadedRow(JobStore& store, const BlobStore& blobs, const v1::FileRef& file);

}  // namespace ppft::coordinator
