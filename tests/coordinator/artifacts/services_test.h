// The room behind gRPC on loopback, with a real store and the real ppft-prepare; and the calls of its clients.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "common/net/channel.h"
#include "coordinator/artifacts/artifacts.h"
#include "ppft/v1/artifact.grpc.pb.h"
#include "ppft/v1/blob.grpc.pb.h"
#include "ppft/v1/dataset.grpc.pb.h"
#include "ppft/v1/model.grpc.pb.h"
#include "ppft/v1/worker.grpc.pb.h"
#include "tests/coordinator/artifacts/inline_controller.h"

namespace ppft::coordinator {

// The file half of WorkerService by itself.
class WorkerFace : public v1::WorkerService::Service {
 public:
  explicit WorkerFace(WorkerFiles* files) : files_(files) {}
  grpc::Status FetchFile(grpc::ServerContext* context, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) override {
    return files_->FetchFile(context, request, writer);
  }
  grpc::Status PutFile(grpc::ServerContext* context, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) override {
    return files_->PutFile(context, reader, response);
  }

 private:
  WorkerFiles* const files_;
};

inline constexpr char kCancelledJob[] = "job-cancelled";

class ServicesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(::testing::TempDir(), "ppft_services_", getpid(), "_", ::testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(MakeDirs(JoinPath(dir_, "root")).ok());
    ASSERT_TRUE(MakeDirs(JoinPath(dir_, "data")).ok());
    Start();
  }
  void TearDown() override {
    Stop();
    ASSERT_TRUE(RemoveAll(dir_).ok());
  }
  void Start() {
    auto store = OpenSqliteJobStore(JoinPath(dir_, "data"));
    ASSERT_TRUE(store.ok()) << store.status();
    controller_ = std::make_unique<InlineController>(std::move(*store));
    ArtifactsOptions options;
    options.data_dir = JoinPath(dir_, "data");
    options.model_roots = {JoinPath(dir_, "root")};
    options.prepare_binary = PPFT_PREPARE;
    options.count_bytes = [this](const char* direction, int64_t bytes) {
      std::lock_guard<std::mutex> lock(moved_mutex_);
      moved_[direction] += bytes;
    };
    auto artifacts = Artifacts::Open(options);
    ASSERT_TRUE(artifacts.ok()) << artifacts.status();
    artifacts_ = std::move(*artifacts);
    const auto find_job = [](JobStore&, const std::string& id) -> absl::StatusOr<v1::Job> {
      if (id != kCancelledJob) return absl::NotFoundError("no job " + id);
      v1::Job job;
      job.set_id(id);
      job.mutable_status()->set_state(v1::JOB_STATE_CANCELLED);
      return job;
    };
    ASSERT_TRUE(artifacts_->Attach(controller_.get(), find_job).ok());
    worker_face_ = std::make_unique<WorkerFace>(artifacts_->worker_files());
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    for (grpc::Service* service : artifacts_->services()) builder.RegisterService(service);
    builder.RegisterService(worker_face_.get());
    server_ = builder.BuildAndStart();
    channel_ = net::MakeChannel(absl::StrCat("127.0.0.1:", port));
  }
  void Stop() {
    server_->Shutdown();
    server_.reset();
    worker_face_.reset();
    artifacts_.reset();
    controller_.reset();
  }

  grpc::Status Upload(const std::string& bytes, int64_t offset = 0) {
    grpc::ClientContext context;
    v1::UploadBlobResponse response;
    auto writer = v1::BlobService::NewStub(channel_)->UploadBlob(&context, &response);
    v1::UploadBlobRequest request;
    request.mutable_header()->set_sha256(Sha256Hex(bytes));
    request.mutable_header()->set_size_bytes(static_cast<int64_t>(bytes.size()));
    request.mutable_header()->set_offset(offset);
    writer->Write(request);
    for (size_t at = static_cast<size_t>(offset); at < bytes.size(); at += 1 << 20) {
      request.set_data(bytes.substr(at, 1 << 20));
      if (!writer->Write(request)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }
  grpc::Status CreateDataset(const std::string& name, const std::string& bytes, v1::Dataset* dataset, const std::string& request_id = "") {
    grpc::ClientContext context;
    v1::CreateDatasetRequest request;
    request.set_request_id(request_id.empty() ? absl::StrCat("r", ++counter_) : request_id);
    request.set_name(name);
    request.set_sha256(Sha256Hex(bytes));
    return v1::DatasetService::NewStub(channel_)->CreateDataset(&context, request, dataset);
  }
  grpc::Status Register(v1::RegisterModelRequest request, v1::Model* model) {
    grpc::ClientContext context;
    if (request.request_id().empty()) request.set_request_id(absl::StrCat("r", ++counter_));
    return v1::ModelService::NewStub(channel_)->RegisterModel(&context, request, model);
  }
  grpc::Status Register(const std::string& name, const std::string& path, v1::Model* model = nullptr) {
    v1::RegisterModelRequest request;
    request.set_name(name);
    request.set_path(path);
    v1::Model unused;
    return Register(request, model != nullptr ? model : &unused);
  }
  int NumModels() {
    grpc::ClientContext context;
    v1::ListModelsResponse response;
    EXPECT_TRUE(v1::ModelService::NewStub(channel_)->ListModels(&context, v1::ListModelsRequest(), &response).ok());
    return response.models_size();
  }
  grpc::Status Fetch(const std::string& sha256, int64_t offset, std::string* bytes, bool check = false) {
    grpc::ClientContext context;
    v1::FetchFileRequest request;
    request.set_check(check);
    request.set_sha256(sha256);
    request.set_offset(offset);
    auto reader = v1::WorkerService::NewStub(channel_)->FetchFile(&context, request);
    v1::FileChunk chunk;
    bytes->clear();
    while (reader->Read(&chunk)) {
      EXPECT_EQ(chunk.offset(), offset + static_cast<int64_t>(bytes->size()));
      *bytes += chunk.data();
    }
    return reader->Finish();
  }
  grpc::Status Put(int64_t epoch, const std::string& bytes, const std::string& sha256) {
    grpc::ClientContext context;
    v1::PutFileResponse response;
    auto writer = v1::WorkerService::NewStub(channel_)->PutFile(&context, &response);
    v1::PutFileRequest request;
    request.mutable_header()->mutable_rank()->set_job_id("job-1");
    request.mutable_header()->mutable_rank()->set_epoch(epoch);
    request.mutable_header()->mutable_file()->set_sha256(sha256);
    request.mutable_header()->mutable_file()->set_size_bytes(static_cast<int64_t>(bytes.size()));
    writer->Write(request);
    request.set_data(bytes);
    writer->Write(request);
    writer->WritesDone();
    return writer->Finish();
  }

  std::string dir_;
  int counter_ = 0;
  std::mutex moved_mutex_;
  std::map<std::string, int64_t> moved_;  // bytes by direction; guarded by moved_mutex_
  std::unique_ptr<InlineController> controller_;
  std::unique_ptr<Artifacts> artifacts_;
  std::unique_ptr<WorkerFace> worker_face_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

}  // namespace ppft::coordinator
