// A coordinator's services over a real gRPC server on loopback, with answers and faults that a test sets.
#pragma once

#include <grpcpp/grpcpp.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "clients/ppctl/cli.h"
#include "ppft/v1/artifact.grpc.pb.h"
#include "ppft/v1/blob.grpc.pb.h"
#include "ppft/v1/cluster.grpc.pb.h"
#include "ppft/v1/dataset.grpc.pb.h"
#include "ppft/v1/job.grpc.pb.h"
#include "ppft/v1/model.grpc.pb.h"

namespace ppft::ctl {

class FakeCoordinator : public v1::JobService::Service,
                        public v1::DatasetService::Service,
                        public v1::ModelService::Service,
                        public v1::ArtifactService::Service,
                        public v1::ClusterService::Service,
                        public v1::BlobService::Service {
 public:
  FakeCoordinator();
  ~FakeCoordinator() override { Stop(); }

  // Again on the same port, as after a crash.
  void Start(int port);
  void Stop();
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  int port() const { return port_; }

  // The next calls of a method fail so, one after the other.
  void Fail(const std::string& method, grpc::StatusCode code, const std::string& message = "as the test wants it") {
    std::lock_guard<std::mutex> lock(mutex_);
    failures_[method].push_back(grpc::Status(code, message));
  }
  int calls(const std::string& method) {
    std::lock_guard<std::mutex> lock(mutex_);
    return calls_[method];
  }

  // What the test sets and looks at; the mutex is for what streams change while a test watches.
  std::vector<v1::Violation> violations;
  std::map<std::string, std::string> blobs;    // complete, by sha256
  std::map<std::string, std::string> partial;  // cut uploads
  int64_t cut_upload_after = -1;               // bytes of the next upload that arrive before the stream breaks; -1: all
  v1::ValidateJobRequest validated;
  std::vector<v1::SubmitJobRequest> submitted;
  v1::RegisterModelRequest registered;
  v1::PreviewDatasetRequest previewed;
  v1::PreviewDatasetResponse preview;
  std::vector<v1::Job> list;                 // in pages of 2
  std::deque<std::vector<v1::Job>> watches;  // one list per WatchJob call; the stream then breaks unless the last job has ended
  std::vector<int64_t> watched_after;
  std::function<void()> before_watch;
  std::vector<v1::LogLine> logs;
  v1::ArtifactManifest manifest;
  std::vector<v1::CheckpointManifest> checkpoints;
  std::map<std::string, std::string> contents;  // what Download serves, by sha256
  std::vector<int64_t> download_offsets;
  int64_t cut_download_after = -1;
  std::vector<v1::TraceJobResponse> trace;
  v1::TraceJobRequest traced;
  v1::GetStatusResponse status;
  std::vector<v1::Worker> workers;
  v1::CheckFilesResponse files;
  std::vector<v1::MetricRow> rows;
  std::string authorization;                  // of the last GetStatus
  std::optional<absl::Duration> clock_ahead;  // of this host's, told by GetStatus; nothing: it tells no time

  grpc::Status ValidateJob(grpc::ServerContext*, const v1::ValidateJobRequest* request, v1::ValidateJobResponse* response) override;
  grpc::Status PlanJob(grpc::ServerContext*, const v1::PlanJobRequest* request, v1::PlanJobResponse* response) override;
  grpc::Status SubmitJob(grpc::ServerContext*, const v1::SubmitJobRequest* request, v1::Job* response) override;
  grpc::Status GetJob(grpc::ServerContext*, const v1::GetJobRequest* request, v1::Job* response) override;
  grpc::Status ListJobs(grpc::ServerContext*, const v1::ListJobsRequest* request, v1::ListJobsResponse* response) override;
  grpc::Status WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request, grpc::ServerWriter<v1::WatchJobResponse>* writer) override;
  grpc::Status CancelJob(grpc::ServerContext*, const v1::CancelJobRequest* request, v1::Job* response) override;
  grpc::Status StreamLogs(grpc::ServerContext*, const v1::StreamLogsRequest* request, grpc::ServerWriter<v1::LogLine>* writer) override;
  grpc::Status GetBlob(grpc::ServerContext*, const v1::GetBlobRequest* request, v1::GetBlobResponse* response) override;
  grpc::Status UploadBlob(grpc::ServerContext*, grpc::ServerReader<v1::UploadBlobRequest>* reader, v1::UploadBlobResponse* response) override;
  grpc::Status CreateDataset(grpc::ServerContext*, const v1::CreateDatasetRequest* request, v1::Dataset* response) override;
  grpc::Status PreviewDataset(grpc::ServerContext*, const v1::PreviewDatasetRequest* request, v1::PreviewDatasetResponse* response) override;
  grpc::Status CreateAdapter(grpc::ServerContext*, const v1::CreateAdapterRequest* request, v1::ArtifactManifest* response) override;
  grpc::Status ListCheckpoints(grpc::ServerContext*, const v1::ListCheckpointsRequest* request, v1::ListCheckpointsResponse* response) override;
  grpc::Status GetManifest(grpc::ServerContext*, const v1::GetManifestRequest* request, v1::ArtifactManifest* response) override;
  grpc::Status Download(grpc::ServerContext*, const v1::DownloadRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) override;
  grpc::Status RegisterModel(grpc::ServerContext*, const v1::RegisterModelRequest* request, v1::Model* response) override;
  grpc::Status ListModels(grpc::ServerContext*, const v1::ListModelsRequest* request, v1::ListModelsResponse* response) override;
  grpc::Status GetModel(grpc::ServerContext*, const v1::GetModelRequest* request, v1::Model* response) override;
  grpc::Status TraceJob(grpc::ServerContext*, const v1::TraceJobRequest* request, grpc::ServerWriter<v1::TraceJobResponse>* writer) override;
  grpc::Status GetMetrics(grpc::ServerContext*, const v1::GetMetricsRequest* request, v1::GetMetricsResponse* response) override;
  grpc::Status CheckFiles(grpc::ServerContext*, const v1::CheckFilesRequest* request, v1::CheckFilesResponse* response) override;
  grpc::Status GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest* request, v1::GetStatusResponse* response) override;
  grpc::Status ListWorkers(grpc::ServerContext*, const v1::ListWorkersRequest* request, v1::ListWorkersResponse* response) override;

 private:
  // Counts the call; the failure that waits for it, or OK.
  grpc::Status Enter(const std::string& method);

  std::mutex mutex_;
  std::map<std::string, int> calls_;
  std::map<std::string, std::deque<grpc::Status>> failures_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

v1::Job MakeJob(const std::string& id, v1::JobState state, int64_t seq = 1, int64_t step = 0);

// One run of ppctl in this process.
struct Outcome {
  int code = -1;
  std::string out, err;
};
Outcome Ppctl(FakeCoordinator& coordinator, std::vector<std::string> arguments);

// A folder that goes away with the test.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  std::string Write(const std::string& name, const std::string& content) const;

 private:
  std::string path_;
};
std::string ReadAll(const std::string& path);

}  // namespace ppft::ctl
