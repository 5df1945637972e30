#include "tests/clients/ppctl/fake_coordinator.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/time/clock.h"
#include "common/base/proto_time.h"
#include "common/base/sha256.h"
#include "common/net/channel.h"

namespace ppft::ctl {

FakeCoordinator::FakeCoordinator() {
  status.set_version("1.2.3");
  v1::Worker& worker = workers.emplace_back();
  worker.set_name("worker-0");
  worker.set_state("ready");
  worker.add_devices()->set_id("cpu:0");
  Start(0);
}

void FakeCoordinator::Start(int port) {
  grpc::ServerBuilder builder;
  net::ApplyServerLimits(&builder);
  builder.AddListeningPort("127.0.0.1:" + std::to_string(port), grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(static_cast<v1::JobService::Service*>(this));
  builder.RegisterService(static_cast<v1::DatasetService::Service*>(this));
  builder.RegisterService(static_cast<v1::ModelService::Service*>(this));
  builder.RegisterService(static_cast<v1::ArtifactService::Service*>(this));
  builder.RegisterService(static_cast<v1::ClusterService::Service*>(this));
  builder.RegisterService(static_cast<v1::BlobService::Service*>(this));
  server_ = builder.BuildAndStart();
  if (server_ == nullptr) ADD_FAILURE() << "no server on port " << port;
}

void FakeCoordinator::Stop() {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_.reset();
}

grpc::Status FakeCoordinator::Enter(const std::string& method) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++calls_[method];
  auto& waiting = failures_[method];
  if (waiting.empty()) return grpc::Status::OK;
  const grpc::Status status = waiting.front();
  waiting.pop_front();
  return status;
}

#define FAKE_ENTER(method)                      \
  do {                                          \
    const grpc::Status entered = Enter(method); \
    if (!entered.ok()) return entered;          \
  } while (false)

grpc::Status FakeCoordinator::ValidateJob(grpc::ServerContext*, const v1::ValidateJobRequest* request, v1::ValidateJobResponse* response) {
  validated = *request;
  FAKE_ENTER("ValidateJob");
  for (const v1::Violation& violation : violations) *response->add_violations() = violation;
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::PlanJob(grpc::ServerContext*, const v1::PlanJobRequest*, v1::PlanJobResponse* response) {
  FAKE_ENTER("PlanJob");
  v1::Plan* plan = response->mutable_plan();
  plan->set_schedule("1f1b");
  plan->set_pipeline_parallel_size(2);
  plan->set_data_parallel_size(1);
  plan->set_num_microbatches(8);
  plan->set_microbatch_tokens(512);
  plan->set_microbatches_per_pass(3);
  for (int i = 0; i < 2; ++i) {
    v1::StagePlan* stage = plan->add_stages();
    stage->set_stage(i);
    stage->set_first_layer(i * 3);
    stage->set_num_layers(i == 0 ? 3 : 2);
    stage->set_has_embedding(i == 0);
    stage->set_has_head(i == 1);
    stage->set_forward_cost(1);
    v1::RankPlan* rank = plan->add_ranks();
    rank->set_rank(i);
    rank->add_stages(i);
    rank->set_peak_activations(2 - i);
    rank->mutable_memory()->set_weight_bytes(int64_t{3} << 29);
    rank->mutable_memory()->set_activation_bytes(int64_t{320} << 20);
    rank->set_peak_bytes(int64_t{2} << 30);
  }
  plan->set_activation_checkpointing("selective");
  response->set_devices_needed(2);
  response->set_devices_present(1);
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::SubmitJob(grpc::ServerContext*, const v1::SubmitJobRequest* request, v1::Job* response) {
  submitted.push_back(*request);
  FAKE_ENTER("SubmitJob");
  *response = MakeJob("job-00000001", v1::JOB_STATE_PREPARING);
  *response->mutable_spec() = request->spec();
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::GetJob(grpc::ServerContext*, const v1::GetJobRequest* request, v1::Job* response) {
  FAKE_ENTER("GetJob");
  for (const v1::Job& job : list) {
    if (job.id() == request->id() || job.name() == request->id()) {
      *response = job;
      return grpc::Status::OK;
    }
  }
  return grpc::Status(grpc::StatusCode::NOT_FOUND, "there is no job " + request->id());
}

grpc::Status FakeCoordinator::ListJobs(grpc::ServerContext*, const v1::ListJobsRequest* request, v1::ListJobsResponse* response) {
  FAKE_ENTER("ListJobs");
  size_t at = request->page_token().empty() ? 0 : std::stoul(request->page_token());
  for (int i = 0; i < 2 && at < list.size(); ++i, ++at) *response->add_jobs() = list[at];
  if (at < list.size()) response->set_next_page_token(std::to_string(at));
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request, grpc::ServerWriter<v1::WatchJobResponse>* writer) {
  if (before_watch) before_watch();
  watched_after.push_back(request->after_seq());
  FAKE_ENTER("WatchJob");
  if (watches.empty()) {
    while (!context->IsCancelled()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return grpc::Status::CANCELLED;
  }
  const std::vector<v1::Job> news = watches.front();
  watches.pop_front();
  v1::WatchJobResponse response;
  for (const v1::Job& job : news) {
    *response.mutable_job() = job;
    writer->Write(response);
  }
  const v1::JobState last = news.empty() ? v1::JOB_STATE_RUNNING : news.back().status().state();
  const bool ended = last == v1::JOB_STATE_SUCCEEDED || last == v1::JOB_STATE_FAILED || last == v1::JOB_STATE_CANCELLED;
  return ended ? grpc::Status::OK : grpc::Status(grpc::StatusCode::UNAVAILABLE, "cut");
}

grpc::Status FakeCoordinator::CancelJob(grpc::ServerContext*, const v1::CancelJobRequest* request, v1::Job* response) {
  FAKE_ENTER("CancelJob");
  if (request->request_id().empty()) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no request_id");
  *response = MakeJob(request->id(), v1::JOB_STATE_CANCELLING);
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::StreamLogs(grpc::ServerContext*, const v1::StreamLogsRequest* request, grpc::ServerWriter<v1::LogLine>* writer) {
  const grpc::Status fault = Enter("StreamLogs");
  for (const v1::LogLine& line : logs) {
    if (line.seq() <= request->after_seq()) continue;
    writer->Write(line);
    if (!fault.ok()) return fault;  // after the first line
  }
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::GetBlob(grpc::ServerContext*, const v1::GetBlobRequest* request, v1::GetBlobResponse* response) {
  FAKE_ENTER("GetBlob");
  response->set_complete(blobs.count(request->sha256()) > 0);
  response->set_received_bytes(response->complete() ? static_cast<int64_t>(blobs[request->sha256()].size())
                                                    : static_cast<int64_t>(partial[request->sha256()].size()));
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::UploadBlob(grpc::ServerContext*, grpc::ServerReader<v1::UploadBlobRequest>* reader, v1::UploadBlobResponse* response) {
  FAKE_ENTER("UploadBlob");
  v1::UploadBlobRequest message;
  if (!reader->Read(&message) || !message.has_header()) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no header");
  const v1::UploadBlobRequest::Header header = message.header();
  std::string& bytes = partial[header.sha256()];
  if (header.offset() != static_cast<int64_t>(bytes.size())) return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "wrong offset");
  const int64_t cut = cut_upload_after;
  cut_upload_after = -1;
  while (reader->Read(&message)) {
    if (message.data().size() > net::kChunkBytes) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "chunk too large");
    bytes += message.data();
    if (cut >= 0 && static_cast<int64_t>(bytes.size()) >= cut) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "cut");
  }
  if (Sha256Hex(bytes) != header.sha256()) {
    partial.erase(header.sha256());
    return grpc::Status(grpc::StatusCode::DATA_LOSS, "the SHA-256 differs");
  }
  response->set_sha256(header.sha256());
  blobs[header.sha256()] = bytes;
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::CreateDataset(grpc::ServerContext*, const v1::CreateDatasetRequest* request, v1::Dataset* response) {
  FAKE_ENTER("CreateDataset");
  if (blobs.count(request->sha256()) == 0) return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "no such blob");
  response->set_id("ds-" + request->sha256().substr(0, 16));
  response->set_name(request->name());
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::PreviewDataset(grpc::ServerContext*, const v1::PreviewDatasetRequest* request, v1::PreviewDatasetResponse* response) {
  FAKE_ENTER("PreviewDataset");
  previewed = *request;
  *response = preview;
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::CreateAdapter(grpc::ServerContext*, const v1::CreateAdapterRequest* request, v1::ArtifactManifest* response) {
  FAKE_ENTER("CreateAdapter");
  response->set_id("adapter-0123456789abcdef");
  *response->mutable_files() = request->files();
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::ListCheckpoints(grpc::ServerContext*, const v1::ListCheckpointsRequest*, v1::ListCheckpointsResponse* response) {
  FAKE_ENTER("ListCheckpoints");
  *response->mutable_checkpoints() = {checkpoints.begin(), checkpoints.end()};
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::GetManifest(grpc::ServerContext*, const v1::GetManifestRequest*, v1::ArtifactManifest* response) {
  FAKE_ENTER("GetManifest");
  *response = manifest;
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::Download(grpc::ServerContext*, const v1::DownloadRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) {
  download_offsets.push_back(request->offset());
  FAKE_ENTER("Download");
  const std::string& bytes = contents[request->sha256()];
  const int64_t cut = cut_download_after;
  cut_download_after = -1;
  v1::FileChunk chunk;
  for (size_t at = static_cast<size_t>(request->offset()); at < bytes.size(); at += chunk.data().size()) {
    if (cut >= 0 && static_cast<int64_t>(at) >= cut) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "cut");
    chunk.set_offset(static_cast<int64_t>(at));
    chunk.set_data(bytes.substr(at, 1000));
    writer->Write(chunk);
  }
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::RegisterModel(grpc::ServerContext*, const v1::RegisterModelRequest* request, v1::Model* response) {
  FAKE_ENTER("RegisterModel");
  registered = *request;
  response->set_name(request->name());
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::ListModels(grpc::ServerContext*, const v1::ListModelsRequest*, v1::ListModelsResponse* response) {
  FAKE_ENTER("ListModels");
  v1::Model* model = response->add_models();
  model->set_name("tiny");
  model->set_path("/models/llama/tiny-folder");
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::GetModel(grpc::ServerContext*, const v1::GetModelRequest* request, v1::Model* response) {
  FAKE_ENTER("GetModel");
  if (request->name() != "tiny") return grpc::Status(grpc::StatusCode::NOT_FOUND, "no such model");
  response->set_name("tiny");
  response->set_max_position_embeddings(512);
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest*, v1::GetStatusResponse* response) {
  const auto shown = context->client_metadata().find("authorization");
  authorization = shown == context->client_metadata().end() ? "" : std::string(shown->second.data(), shown->second.size());
  FAKE_ENTER("GetStatus");
  *response = status;
  if (clock_ahead.has_value()) SetTime(absl::Now() + *clock_ahead, response->mutable_time());
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::TraceJob(grpc::ServerContext*, const v1::TraceJobRequest* request, grpc::ServerWriter<v1::TraceJobResponse>* writer) {
  FAKE_ENTER("TraceJob");
  traced = *request;
  for (const v1::TraceJobResponse& part : trace) writer->Write(part);
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::GetMetrics(grpc::ServerContext*, const v1::GetMetricsRequest* request, v1::GetMetricsResponse* response) {
  FAKE_ENTER("GetMetrics");
  for (const v1::MetricRow& row : rows) {
    if (row.step() > request->after_step()) *response->add_rows() = row;
  }
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::CheckFiles(grpc::ServerContext*, const v1::CheckFilesRequest*, v1::CheckFilesResponse* response) {
  FAKE_ENTER("CheckFiles");
  *response = files;
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::ListWorkers(grpc::ServerContext*, const v1::ListWorkersRequest*, v1::ListWorkersResponse* response) {
  FAKE_ENTER("ListWorkers");
  for (const v1::Worker& worker : workers) *response->add_workers() = worker;
  return grpc::Status::OK;
}

v1::Job MakeJob(const std::string& id, v1::JobState state, int64_t seq, int64_t step) {
  v1::Job job;
  job.set_id(id);
  job.set_name("name-of-" + id);
  job.set_seq(seq);
  job.mutable_status()->set_state(state);
  job.mutable_status()->set_step(step);
  job.mutable_status()->set_total_steps(100);
  return job;
}

Outcome Ppctl(FakeCoordinator& coordinator, std::vector<std::string> arguments) {
  std::ostringstream out, err;
  Terminal terminal{&out, &err};
  arguments.insert(arguments.end(), {"--server", coordinator.address()});
  Outcome outcome;
  outcome.code = Run(arguments, &terminal);
  outcome.out = out.str();
  outcome.err = err.str();
  return outcome;
}

TempFolder::TempFolder() {
  path_ = (std::filesystem::temp_directory_path() / "ppctl-test-XXXXXX").string();
  if (mkdtemp(path_.data()) == nullptr) ADD_FAILURE() << "no temporary folder";
}

TempFolder::~TempFolder() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

std::string TempFolder::Write(const std::string& name, const std::string& content) const {
  const std::filesystem::path path = std::filesystem::path(path_) / name;
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << content;
  return path.string();
}

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

}  // namespace ppft::ctl
