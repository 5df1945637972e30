// The coordinator's services on loopback over a real store, with a stand-in for the slow work, so that jobs can be driven by fake workers.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/net/channel.h"
#include "common/spec/spec.h"
#include "coordinator/core/job_state.h"
#include "coordinator/service/call_gate.h"
#include "coordinator/service/cluster_service.h"
#include "coordinator/service/job_service.h"
#include "coordinator/service/worker_service.h"
#include "coordinator/store/sqlite_job_store.h"

namespace ppft::coordinator {

inline constexpr char kConfig[] =
    R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,"intermediate_size":172,"num_hidden_layers":5,"num_attention_heads":8,)"
    R"("num_key_value_heads":4,"vocab_size":512,"max_position_embeddings":512,"rms_norm_eps":1e-5,"rope_theta":10000.0,"tie_word_embeddings":true,)"
    R"("hidden_act":"silu","torch_dtype":"float32"})";

class StandInWork : public JobWork {
 public:
  absl::StatusOr<v1::PreparedData> Prepare(const PrepareInput& input, const std::function<bool()>&) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!prepare_error_.ok()) return prepare_error_;
    v1::PreparedData data;
    data.mutable_train_tokens()->set_sha256("tokens");
    data.mutable_train()->set_rows(8);
    for (int row = 0; row < 8; ++row) {
      data.mutable_train()->add_lengths(10);
      data.mutable_train()->add_targets(5);
    }
    return data;
  }
  absl::StatusOr<std::vector<v1::ArtifactManifest>> Assemble(const AssembleInput& input) override {
    v1::ArtifactManifest manifest;
    manifest.set_type("adapter");
    for (const v1::ExportWritten& exported : input.exports) {
      for (const v1::LocalFile& file : exported.adapter_files()) *manifest.add_files() = file.content();
    }
    return std::vector<v1::ArtifactManifest>{manifest};
  }
  void DeleteBlobs(const std::vector<std::string>& sha256s) override {
    std::lock_guard<std::mutex> lock(mutex_);
    deleted_.insert(sha256s.begin(), sha256s.end());
  }
  absl::Status CheckBlobs(const std::vector<std::string>& sha256s) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!store_error_.ok()) return store_error_;
    for (const std::string& sha256 : sha256s) {
      if (damaged_.count(sha256) > 0) return absl::DataLossError(absl::StrCat(sha256, " is damaged"));
    }
    return absl::OkStatus();
  }
  // What lies damaged in the store from now on.
  void set_damaged(std::set<std::string> sha256s) {
    std::lock_guard<std::mutex> lock(mutex_);
    damaged_ = std::move(sha256s);
  }
  void set_store_error(absl::Status status) {
    std::lock_guard<std::mutex> lock(mutex_);
    store_error_ = std::move(status);
  }
  DiskRoom LookAtDisk() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return room_;
  }
  void GiveUpBallast() override {}
  void set_room(DiskRoom room) {
    std::lock_guard<std::mutex> lock(mutex_);
    room_ = room;
  }
  void set_prepare_error(absl::Status status) {
    std::lock_guard<std::mutex> lock(mutex_);
    prepare_error_ = std::move(status);
  }
  bool was_deleted(const std::string& sha256) {
    std::lock_guard<std::mutex> lock(mutex_);
    return deleted_.count(sha256) > 0;
  }

 private:
  std::mutex mutex_;
  absl::Status prepare_error_;     // guarded by mutex_
  DiskRoom room_;                  // guarded by mutex_
  std::set<std::string> deleted_;  // guarded by mutex_
  std::set<std::string> damaged_;  // guarded by mutex_
  absl::Status store_error_;       // guarded by mutex_
};

class NoFiles : public WorkerFiles {
 public:
  grpc::Status FetchFile(grpc::ServerContext*, const v1::FetchFileRequest*, grpc::ServerWriter<v1::FileChunk>*) override {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no files here");
  }
  grpc::Status PutFile(grpc::ServerContext*, grpc::ServerReader<v1::PutFileRequest>*, v1::PutFileResponse*) override {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no files here");
  }
};

// As many devices as parallel.pipeline_parallel_size, in the order given.
inline PlanAttempt PlanAsAsked(const v1::JobRecord& record, const v1::ModelRecord&, const std::vector<OfferedDevice>& devices, const std::string&) {
  PlanAttempt attempt;
  const int size = attempt.devices_needed = record.job().spec().parallel().pipeline_parallel_size();
  if (static_cast<int>(devices.size()) < size) return attempt;
  attempt.plan.emplace();
  attempt.plan->set_pipeline_parallel_size(size);
  attempt.plan->set_total_steps(100);
  for (int i = 0; i < size; ++i) {
    attempt.plan->add_stages()->set_stage(i);
    v1::RankPlan& rank = *attempt.plan->add_ranks();
    rank.set_rank(i);
    rank.set_pipeline_rank(i);
    rank.set_worker(devices[i].worker);
    rank.set_device(devices[i].device.id());
    rank.add_stages(i);
  }
  return attempt;
}

class ServiceTest : public testing::Test {
 protected:
  ServiceTest() {
    dir_ = testing::TempDir() + "ppft-service-XXXXXX";
    EXPECT_NE(mkdtemp(dir_.data()), nullptr) << dir_;
    options_.heartbeat_interval = absl::Milliseconds(200);
    options_.work_retry_delay = absl::Milliseconds(50);
  }
  ~ServiceTest() override {
    Down();
    RemoveAll(dir_).IgnoreError();
  }

  void Up() {
    auto store = OpenSqliteJobStore(dir_);
    ASSERT_TRUE(store.ok()) << store.status();
    metrics_ = std::make_unique<metrics::CoordinatorMetrics>("test");
    controller_ = std::make_unique<JobController>(*std::move(store), &work_, metrics_.get(), PlanAsAsked, options_);
    ASSERT_TRUE(controller_->Start().ok());
    jobs_service_ = std::make_unique<JobServiceImpl>(
        controller_.get(),
        [](const v1::ArtifactManifest&, const v1::ModelRecord&, const v1::AdapterSpec&) { return absl::InvalidArgumentError("another model's adapter"); },
        [this](const v1::ModelRecord&) { return model_files_; });
    cluster_service_ = std::make_unique<ClusterServiceImpl>(controller_.get(), "test", dir_,
                                                            [](const std::vector<v1::ModelRecord>& models, const std::vector<v1::Dataset>& datasets, bool) {
                                                              v1::CheckFilesResponse response;
                                                              response.set_num_models(static_cast<int>(models.size()));
                                                              response.set_num_datasets(static_cast<int>(datasets.size()));
                                                              return response;
                                                            });
    worker_service_ = std::make_unique<WorkerServiceImpl>(controller_.get(), &files_);
    grpc::ServerBuilder builder;
    net::ApplyServerLimits(&builder);
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(jobs_service_.get());
    builder.RegisterService(cluster_service_.get());
    builder.RegisterService(worker_service_.get());
    std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> gates;
    gates.push_back(MakeCallGate(metrics_.get()));
    builder.experimental().SetInterceptorCreators(std::move(gates));
    server_ = builder.BuildAndStart();
    address_ = absl::StrCat("127.0.0.1:", port);
    jobs_ = v1::JobService::NewStub(net::MakeChannel(address_));
    cluster_ = v1::ClusterService::NewStub(net::MakeChannel(address_));
  }

  void Down() {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
    controller_.reset();
  }

  // A model, a dataset and a valid spec over `stages` devices.
  void Register() {
    const absl::Status status = controller_->Run([](JobStore& store) -> absl::Status {
      v1::ModelRecord model;
      model.mutable_model()->set_name("tiny");
      model.mutable_model()->set_tie_word_embeddings(true);
      model.set_config(kConfig);
      if (absl::Status inserted = store.InsertModel(model); !inserted.ok()) return inserted;
      v1::Dataset dataset;
      dataset.set_id("ds-1");
      dataset.set_sha256("d");
      return store.PutDataset(dataset);
    });
    ASSERT_TRUE(status.ok()) << status;
  }
  static v1::JobSpec Spec(int stages, const std::string& more = "") {
    const spec::ParseResult parsed = spec::Parse(
        "job.yaml", absl::StrCat("name: small\nmodel: {base_model: tiny}\ndata:\n  sequence_len: 64\n  datasets: [{path: ds-1, type: completion}]\n",
                                 "parallel: {pipeline_parallel_size: ", stages, "}\ncheckpoint: {save_total_limit: 1}\n", more));
    for (const spec::FieldError& error : parsed.errors) ADD_FAILURE() << spec::ToString(error);
    return parsed.spec;
  }

  grpc::Status TrySubmit(const v1::JobSpec& spec, const std::string& request_id, v1::Job* job) {
    grpc::ClientContext context;
    v1::SubmitJobRequest request;
    request.set_request_id(request_id);
    *request.mutable_spec() = spec;
    return jobs_->SubmitJob(&context, request, job);
  }
  std::string Submit(const v1::JobSpec& spec, const std::string& request_id = "r") {
    v1::Job job;
    const grpc::Status status = TrySubmit(spec, request_id, &job);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return job.id();
  }
  v1::Job Get(const std::string& id) {
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_id(id);
    v1::Job job;
    const grpc::Status status = jobs_->GetJob(&context, request, &job);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return job;
  }
  // Watches until the predicate holds; the job as it then was, or as it was last seen.
  v1::Job WaitUntil(const std::string& id, const std::function<bool(const v1::Job&)>& predicate) {
    grpc::ClientContext context;
    net::SetDeadline(&context, absl::Seconds(120));
    v1::WatchJobRequest request;
    request.set_id(id);
    auto stream = jobs_->WatchJob(&context, request);
    v1::WatchJobResponse response;
    while (stream->Read(&response)) {
      if (predicate(response.job())) return response.job();
    }
    ADD_FAILURE() << "not reached: " << response.job().status().ShortDebugString();
    return response.job();
  }
  v1::Job WaitFor(const std::string& id, v1::JobState state) {
    return WaitUntil(id, [state](const v1::Job& job) { return job.status().state() == state; });
  }
  std::vector<v1::Event> Events(const std::string& id) {
    grpc::ClientContext context;
    v1::StreamEventsRequest request;
    request.set_job_id(id);
    auto stream = jobs_->StreamEvents(&context, request);
    std::vector<v1::Event> events;
    v1::Event event;
    while (stream->Read(&event)) events.push_back(event);
    return events;
  }
  // "PREPARING QUEUED …": the moves alone.
  std::string Road(const std::string& id) {
    std::string road;
    for (const v1::Event& event : Events(id)) {
      if (event.from() != event.to()) absl::StrAppend(&road, road.empty() ? "" : " ", StateWord(event.to()));
    }
    return road;
  }
  std::vector<int64_t> MetricSteps(const std::string& id) {
    grpc::ClientContext context;
    v1::GetMetricsRequest request;
    request.set_job_id(id);
    request.set_after_step(-1);
    v1::GetMetricsResponse response;
    EXPECT_TRUE(jobs_->GetMetrics(&context, request, &response).ok());
    std::vector<int64_t> steps;
    for (const v1::MetricRow& row : response.rows()) steps.push_back(row.step());
    return steps;
  }

  std::string dir_;
  ControllerOptions options_;
  StandInWork work_;
  NoFiles files_;
  std::unique_ptr<metrics::CoordinatorMetrics> metrics_;
  absl::Status model_files_;  // the answer of their check
  std::unique_ptr<JobController> controller_;
  std::unique_ptr<JobServiceImpl> jobs_service_;
  std::unique_ptr<ClusterServiceImpl> cluster_service_;
  std::unique_ptr<WorkerServiceImpl> worker_service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::unique_ptr<v1::JobService::Stub> jobs_;
  std::unique_ptr<v1::ClusterService::Stub> cluster_;
};

}  // namespace ppft::coordinator
