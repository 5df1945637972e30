// Files over gRPC: uploads into the coordinator's content-addressed store and downloads from it. Both resume where they were cut, both end with
// a check of the SHA-256. Blocking; call from a thread that may wait.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "ppft/v1/blob.grpc.pb.h"
#include "ppft/v1/file.pb.h"

namespace ppft::net {

// Bytes that are there so far (resumed ones included), of all.
using TransferProgress = std::function<void(int64_t done, int64_t total)>;

struct TransferOptions {
  absl::Duration call_timeout = absl::Seconds(30);    // of a small call
  absl::Duration stream_timeout = absl::Minutes(10);  // of one stream; a stream that made progress is continued by another
  absl::Duration patience = absl::Seconds(30);        // how long UNAVAILABLE is retried without any progress; zero: not at all
  TransferProgress progress;
};

// Makes sure that the coordinator has the file's content. `name` in the result is the file's own name. NOT_FOUND if there is no such file;
// FAILED_PRECONDITION if it changed during the upload; RESOURCE_EXHAUSTED if the coordinator's disk is full (what was sent is kept for the next try).
absl::StatusOr<v1::FileRef> UploadFile(v1::BlobService::StubInterface* stub, const std::string& path, const TransferOptions& options = {});

// Opens the stream of a file's bytes from an offset.
using OpenDownload = std::function<std::unique_ptr<grpc::ClientReaderInterface<v1::FileChunk>>(grpc::ClientContext* context, int64_t offset)>;

// Writes file.size_bytes bytes to PATH.part (going on where an earlier call was cut), checks the SHA-256 and renames it to `path` durably. A file that
// comes damaged is fetched once more from the start; DATA_LOSS if it is damaged again. A complete file at `path` with the right content is left alone.
absl::Status DownloadFile(const OpenDownload& open, const v1::FileRef& file, const std::string& path, const TransferOptions& options = {});

}  // namespace ppft::net
