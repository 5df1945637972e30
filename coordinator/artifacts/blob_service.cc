#include "coordinator/artifacts/blob_service.h"

#include "common/base/sha256.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/artifacts/reply.h"

namespace ppft::coordinator {

grpc::Status BlobServiceImpl::GetBlob(grpc::ServerContext*, const v1::GetBlobRequest* request, v1::GetBlobResponse* response) {
  if (!IsSha256Hex(request->sha256())) return Reply(absl::InvalidArgumentError("sha256 must be 64 lower-case hex digits"));
  const auto size = blobs_->Find(request->sha256());
  if (size) blobs_->Touch(request->sha256());  // the caller is about to name it
  response->set_complete(size.has_value());
  response->set_received_bytes(size ? *size : blobs_->ReceivedBytes(request->sha256()));
  return grpc::Status::OK;
}

grpc::Status BlobServiceImpl::UploadBlob(grpc::ServerContext* context, grpc::ServerReader<v1::UploadBlobRequest>* reader, v1::UploadBlobResponse* response) {
  v1::UploadBlobRequest request;
  if (!reader->Read(&request) || !request.has_header()) return Reply(absl::InvalidArgumentError("the first message must be a header"));
  const v1::UploadBlobRequest::Header header = request.header();
  auto upload = blobs_->StartUpload(header.sha256(), header.sha256(), header.size_bytes(), header.offset());
  if (!upload.ok()) return Reply(upload.status());
  absl::Status status = Receive(**upload, DataOf(context, reader, &request), count_);
  if (!status.ok()) return Reply(status);
  v1::FileRef file;
  file.set_sha256(header.sha256());
  file.set_size_bytes(header.size_bytes());
  status = controller_->Run([this, file](JobStore& store) { return PutUploadedRow(store, *blobs_, file); });
  response->set_sha256(header.sha256());
  response->set_size_bytes(header.size_bytes());
  return Reply(status);
}

}  // namespace ppft::coordinator
