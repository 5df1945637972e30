#include "coordinator/artifacts/worker_files_impl.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/net/status.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/artifacts/reply.h"

namespace ppft::coordinator {

grpc::Status WorkerFilesImpl::FetchFile(grpc::ServerContext* context, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) {
  if (request->check() || !blobs_->Find(request->sha256())) {
    absl::Status status = blobs_->Verify(request->sha256());
    if (absl::IsDataLoss(status)) {
      LogError(status.message());
      net::SetErrorInfo(&status, {"CONTENT_DAMAGED", {}});
      return Reply(status);
    }
  }
  auto range = OpenBlobRange(*blobs_, request->sha256());
  absl::Status absent = range.status();
  if (absl::IsNotFound(absent) || absl::IsUnavailable(absent)) {
    range = models_->OpenTensor(request->sha256(), request->check());
    if (absl::IsNotFound(range.status())) {
      // Not UNAVAILABLE on the wire: workers would wait for it, and nobody would be told.
      if (absl::IsUnavailable(absent)) absent = absl::FailedPreconditionError(absent.message());
      net::SetErrorInfo(&absent, {absl::IsNotFound(absent) ? "CONTENT_MISSING" : "STORE_UNREADABLE", {}});
      LogError(absent.message());
      return Reply(absent);
    }
  }
  if (!range.ok()) return Reply(range.status());
  return Reply(SendRange(*range, request->offset(), context, writer, count_));
}

grpc::Status WorkerFilesImpl::PutFile(grpc::ServerContext* context, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) {
  v1::PutFileRequest request;
  if (!reader->Read(&request) || !request.has_header()) return Reply(absl::InvalidArgumentError("the first message must be a header"));
  const v1::PutFileRequest::Header header = request.header();
  const std::string key = absl::StrCat(header.rank().job_id(), ".", header.rank().epoch(), ".", header.rank().rank(), ".", header.file().sha256());
  const auto put = [&]() -> absl::Status {
    PPFT_RETURN_IF_ERROR(controller_->CheckEpoch(header.rank()));
    absl::Status received;
    {
      PPFT_ASSIGN_OR_RETURN(const auto upload, blobs_->StartUpload(key, header.file().sha256(), header.file().size_bytes(), header.offset()));
      received = Receive(*upload, DataOf(context, reader, &request), count_);
      // Agents begin again at the start: what is left of this try only takes room.
      if (!received.ok()) blobs_->DropPartial(key);
    }
    PPFT_RETURN_IF_ERROR(received);
    // Given up meanwhile: the bytes lie there by their content, and nothing will ever name them for this epoch.
    PPFT_RETURN_IF_ERROR(controller_->CheckEpoch(header.rank()));
    return controller_->Run([&](JobStore& store) { return PutUploadedRow(store, *blobs_, header.file()); });
  };
  const absl::Status status = put();
  if (absl::IsResourceExhausted(status)) {
    controller_->ReportDiskFull(
        header.rank(), header.file().size_bytes() + blobs_->reserve_bytes(),
        absl::StrCat("the coordinator's disk has no room for a file of ", header.file().size_bytes(), " bytes from rank ", header.rank().rank(), ": ",
                     blobs_->data_dir(), " has ", blobs_->FreeBytes(), " bytes free, ", blobs_->reserve_bytes(), " stay reserved"));
  }
  response->set_received_bytes(header.file().size_bytes());
  return Reply(status);
}

}  // namespace ppft::coordinator
