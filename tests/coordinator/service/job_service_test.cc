// The calls of JobService and ClusterService, the gate before them, and the addresses that may be served.
#include "coordinator/service/job_service.h"

#include <gmock/gmock.h>

#include <thread>

#include "common/net/status.h"
#include "coordinator/coordinator.h"
#include "tests/coordinator/service/fake_worker.h"
#include "tests/coordinator/service/test_service.h"

namespace ppft::coordinator {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class JobServiceTest : public ServiceTest {
 protected:
  JobServiceTest() {
    Up();
    Register();
  }
  std::vector<std::string> Fields(const v1::JobSpec& spec) {
    grpc::ClientContext context;
    v1::ValidateJobRequest request;
    *request.mutable_spec() = spec;
    v1::ValidateJobResponse response;
    EXPECT_TRUE(jobs_->ValidateJob(&context, request, &response).ok());
    std::vector<std::string> shown;
    for (const v1::Violation& violation : response.violations()) shown.push_back(violation.field() + ": " + violation.message());
    return shown;
  }
};

TEST_F(JobServiceTest, AnEqualRequestIsTheSameJobAndAnotherOneIsRefused) {
  const std::string id = Submit(Spec(2), "once");
  EXPECT_EQ(Submit(Spec(2), "once"), id);
  v1::Job job;
  EXPECT_EQ(TrySubmit(Spec(1), "once", &job).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(TrySubmit(Spec(1), "", &job).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(TrySubmit(Spec(1), std::string(129, 'x'), &job).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(JobServiceTest, OneRequestFromManyClientsIsOneJob) {
  std::vector<std::thread> clients;
  std::mutex mutex;
  std::set<std::string> ids;
  for (int i = 0; i < 16; ++i) {
    clients.emplace_back([&] {
      v1::Job job;
      const grpc::Status status = TrySubmit(Spec(2), "storm", &job);
      std::lock_guard<std::mutex> lock(mutex);
      ids.insert(status.ok() ? job.id() : status.error_message());
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(ids.size(), 1u) << *ids.begin();
}

TEST_F(JobServiceTest, ValidationNamesFieldAndRemedy) {
  EXPECT_THAT(Fields(Spec(2)), IsEmpty());
  struct Case {
    const char* sentence;
    std::function<void(v1::JobSpec&)> change;
    std::vector<std::string> words;
  };
  const Case cases[] = {
      {"a slip in the model's name is guessed",
       [](v1::JobSpec& s) { s.mutable_model()->set_base_model("tinny"); },
       {"model.base_model", "did you mean \"tiny\""}},
      {"a path is not a model", [](v1::JobSpec& s) { s.mutable_model()->set_base_model("../../etc"); }, {"model.base_model", "model roots"}},
      {"more stages than layers", [](v1::JobSpec& s) { s.mutable_parallel()->set_pipeline_parallel_size(9); }, {"layers"}},
      {"layers that do not add up",
       [](v1::JobSpec& s) {
         s.mutable_parallel()->add_layers_per_stage(1);
         s.mutable_parallel()->add_layers_per_stage(1);
       },
       {"layers_per_stage", "5", "2"}},
      {"a sequence beyond the model", [](v1::JobSpec& s) { s.mutable_data()->set_sequence_len(4096); }, {"data.sequence_len", "512"}},
      {"a dataset that is not there", [](v1::JobSpec& s) { s.mutable_data()->mutable_datasets(0)->set_path("ds-9"); }, {"data.datasets[0].path", "ds-9"}},
      {"an adapter that is not there", [](v1::JobSpec& s) { s.mutable_model()->set_init_adapter("adapter-9"); }, {"model.init_adapter", "adapter-9"}},
  };
  for (const Case& c : cases) {
    v1::JobSpec spec = Spec(2);
    c.change(spec);
    const std::vector<std::string> violations = Fields(spec);
    ASSERT_FALSE(violations.empty()) << c.sentence;
    for (const std::string& word : c.words) EXPECT_THAT(violations[0], HasSubstr(word)) << c.sentence;
    v1::Job job;
    const grpc::Status status = TrySubmit(spec, c.sentence, &job);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << c.sentence;
    EXPECT_THAT(status.error_message(), HasSubstr(violations[0])) << c.sentence;
  }
}

TEST_F(JobServiceTest, ANameThatIsNotThereIsAnsweredWithTheOneThatWasMeant) {
  v1::Dataset dataset;
  dataset.set_id("ds-0123456789abcdef");
  dataset.set_name("articles.jsonl");
  const absl::Status put = controller_->Run([&](JobStore& store) { return store.PutDataset(dataset); });
  ASSERT_TRUE(put.ok()) << put;
  v1::JobSpec spec = Spec(2);
  spec.mutable_data()->mutable_datasets(0)->set_path("ds-0123456789abcdfe");
  EXPECT_THAT(Fields(spec), ElementsAre(HasSubstr("data.datasets[0].path: no dataset \"ds-0123456789abcdfe\"; did you mean \"ds-0123456789abcdef\"?")));
  const auto missing = controller_->Run([](JobStore& store) { return store.GetDataset("artikles.jsonl").status(); });
  EXPECT_THAT(std::string(missing.message()), HasSubstr("did you mean \"articles.jsonl\"? See `ppctl data list`"));
  const auto model = controller_->Run([](JobStore& store) { return store.GetModel("tinny").status(); });
  EXPECT_THAT(std::string(model.message()), HasSubstr("did you mean \"tiny\"? See `ppctl models list`"));
  spec = Spec(2);
  spec.set_name("summaries");
  const std::string id = Submit(spec);
  grpc::ClientContext context, second, third;
  v1::GetJobRequest request;
  v1::Job job;
  request.set_id("sumaries");
  EXPECT_THAT(jobs_->GetJob(&context, request, &job).error_message(), HasSubstr("no job \"sumaries\"; did you mean \"summaries\"? See `ppctl list`"));
  request.set_id(id.substr(0, 9));
  EXPECT_THAT(jobs_->GetJob(&second, request, &job).error_message(), HasSubstr(absl::StrCat("did you mean \"", id, "\"?")));
  request.set_id("nothing like it");
  EXPECT_EQ(jobs_->GetJob(&third, request, &job).error_message(), "no job \"nothing like it\": see `ppctl list`");
}

TEST_F(JobServiceTest, AModelWhoseFilesChangedIsRefused) {
  model_files_ = absl::FailedPreconditionError("/models/tiny/model.safetensors: the file is gone");
  EXPECT_THAT(Fields(Spec(1)), ElementsAre("model.base_model: /models/tiny/model.safetensors: the file is gone"));
  v1::Job job;
  const grpc::Status refused = TrySubmit(Spec(1), "r", &job);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("the file is gone"));
}

TEST_F(JobServiceTest, WhatDoesNotHangTogetherIsToldTogether) {
  v1::JobSpec spec = Spec(9);
  spec.mutable_adapter()->set_r(0);
  spec.mutable_data()->set_sequence_len(100000);
  spec.mutable_parallel()->add_layers_per_stage(1);
  spec.mutable_data()->mutable_datasets(0)->set_path("ds-9");
  EXPECT_THAT(Fields(spec),
              testing::UnorderedElementsAre(HasSubstr("adapter.r: 0 is out of range"), HasSubstr("parallel.layers_per_stage: layers_per_stage has 1 number,"),
                                            HasSubstr("data.sequence_len: 100000 is more than the 512 positions"),
                                            HasSubstr("parallel.pipeline_parallel_size: 9 stages"), HasSubstr("data.datasets[0].path: no dataset \"ds-9\"")));
  spec = Spec(2);
  spec.mutable_model()->set_base_model("nope");
  spec.mutable_training()->set_learning_rate(-1);
  EXPECT_THAT(Fields(spec), testing::UnorderedElementsAre(HasSubstr("model.base_model: no model \"nope\""), HasSubstr("training.learning_rate: -1")));
  spec = Spec(9);
  spec.mutable_parallel()->set_virtual_stages(-3);
  spec.mutable_training()->set_gradient_accumulation_steps(0);
  EXPECT_THAT(Fields(spec), testing::UnorderedElementsAre(HasSubstr("parallel.virtual_stages: -3"), HasSubstr("training.gradient_accumulation_steps: 0")))
      << "what hangs on a wrong value is not judged by it";
}

TEST_F(JobServiceTest, AnOlderClientsJobGetsTheDefaultsOfNewerFields) {
  v1::JobSpec spec = Spec(2);
  spec.mutable_parallel()->clear_cuda_graphs();
  EXPECT_THAT(Fields(spec), IsEmpty());
  EXPECT_EQ(Get(Submit(spec)).spec().parallel().cuda_graphs(), "auto");
  EXPECT_EQ(Submit(spec), Get("small").id()) << "the same request is the same job";
}

TEST_F(JobServiceTest, APathIsValidBeforeTheUploadAndRefusedAtSubmit) {
  v1::JobSpec spec = Spec(2);
  spec.mutable_data()->mutable_datasets(0)->set_path("train.jsonl");
  EXPECT_THAT(Fields(spec), IsEmpty());
  v1::Job job;
  EXPECT_THAT(TrySubmit(spec, "r", &job).error_message(), HasSubstr("not a dataset id"));
}

TEST_F(JobServiceTest, AForeignAdapterIsRefused) {
  ASSERT_TRUE(controller_
                  ->Run([](JobStore& store) {
                    v1::ArtifactManifest adapter;
                    adapter.set_id("adapter-1");
                    adapter.set_type("adapter");
                    return store.PutArtifact(adapter);
                  })
                  .ok());
  v1::JobSpec spec = Spec(2);
  spec.mutable_model()->set_init_adapter("adapter-1");
  EXPECT_THAT(Fields(spec), ElementsAre(HasSubstr("another model's adapter")));
}

TEST_F(JobServiceTest, ListsPageByPageNewestFirstWithFilters) {
  std::vector<std::string> ids;
  for (int i = 0; i < 5; ++i) ids.push_back(Submit(Spec(2, i % 2 == 0 ? "labels: {team: a}\n" : ""), absl::StrCat("r", i)));
  std::vector<std::string> seen;
  v1::ListJobsRequest request;
  request.set_page_size(2);
  int pages = 0;
  do {
    grpc::ClientContext context;
    v1::ListJobsResponse response;
    ASSERT_TRUE(jobs_->ListJobs(&context, request, &response).ok());
    for (const v1::Job& job : response.jobs()) seen.push_back(job.id());
    request.set_page_token(response.next_page_token());
    ++pages;
  } while (!request.page_token().empty());
  EXPECT_EQ(pages, 3);
  EXPECT_THAT(seen, ElementsAre(ids[4], ids[3], ids[2], ids[1], ids[0]));

  const auto count = [&](const v1::ListJobsRequest& filter) {
    grpc::ClientContext context;
    v1::ListJobsResponse response;
    EXPECT_TRUE(jobs_->ListJobs(&context, filter, &response).ok());
    return response.jobs_size();
  };
  v1::ListJobsRequest by_label, by_state;
  (*by_label.mutable_labels())["team"] = "a";
  EXPECT_EQ(count(by_label), 3);
  (*by_label.mutable_labels())["team"] = "b";
  EXPECT_EQ(count(by_label), 0);
  by_state.add_states(v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(count(by_state), 0);
  grpc::ClientContext context;
  v1::ListJobsResponse response;
  request.set_page_token("x");
  EXPECT_EQ(jobs_->ListJobs(&context, request, &response).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(JobServiceTest, ANameFindsTheOnlyJobThatHasIt) {
  const std::string id = Submit(Spec(2), "r1");
  EXPECT_EQ(Get("small").id(), id);
  Submit(Spec(2), "r2");
  grpc::ClientContext context, other;
  v1::GetJobRequest request;
  request.set_id("small");
  v1::Job job;
  EXPECT_EQ(jobs_->GetJob(&context, request, &job).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  request.set_id("job-nowhere");
  EXPECT_EQ(jobs_->GetJob(&other, request, &job).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(JobServiceTest, WatchersGoOnWhereTheyWereAndMayBeMany) {
  const std::string id = Submit(Spec(2));
  const int64_t seq = WaitFor(id, v1::JOB_STATE_QUEUED).seq();
  struct Watcher {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::WatchJobResponse>> stream;
  };
  std::vector<Watcher> watchers(200);
  for (Watcher& watcher : watchers) {
    v1::WatchJobRequest request;
    request.set_id(id);
    request.set_after_seq(seq);
    watcher.stream = jobs_->WatchJob(&watcher.context, request);
  }
  EXPECT_EQ(Get(id).id(), id) << "a plain call is answered while they wait";
  grpc::ClientContext context;
  v1::CancelJobRequest request;
  request.set_id(id);
  v1::Job job;
  ASSERT_TRUE(jobs_->CancelJob(&context, request, &job).ok());
  for (Watcher& watcher : watchers) {
    v1::WatchJobResponse response, last;
    while (watcher.stream->Read(&response)) {
      EXPECT_GT(response.job().seq(), seq);
      last = response;
    }
    EXPECT_TRUE(watcher.stream->Finish().ok());
    EXPECT_EQ(last.job().status().state(), v1::JOB_STATE_CANCELLED);
  }
}

TEST_F(JobServiceTest, ACallerThatGoesAwayLeavesNothingBehind) {
  const std::string id = Submit(Spec(2));
  for (int i = 0; i < 20; ++i) {
    grpc::ClientContext context;
    v1::StreamEventsRequest request;
    request.set_job_id(id);
    request.set_follow(true);
    auto stream = jobs_->StreamEvents(&context, request);
    v1::Event event;
    ASSERT_TRUE(stream->Read(&event));
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  Down();  // would wait for ever for a stream that did not end
}

TEST_F(JobServiceTest, StreamsOfUnknownJobsEndWithNotFound) {
  grpc::ClientContext context;
  v1::WatchJobRequest request;
  request.set_id("job-nowhere");
  auto stream = jobs_->WatchJob(&context, request);
  v1::WatchJobResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(JobServiceTest, WhatIsNotThereYetSaysSo) {
  grpc::ClientContext context;
  v1::PauseJobRequest request;
  v1::Job job;
  const grpc::Status status = jobs_->PauseJob(&context, request, &job);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), HasSubstr("pausing a job"));
}

TEST_F(JobServiceTest, TheClusterShowsWorkersAndFreeDevices) {
  FakeWorker worker(address_, "worker-0", "first", 3);
  worker.welcome_acked();
  grpc::ClientContext context, other;
  v1::GetStatusResponse status;
  ASSERT_TRUE(cluster_->GetStatus(&context, {}, &status).ok());
  EXPECT_EQ(status.num_workers(), 1);
  EXPECT_EQ(status.num_devices(), 3);
  EXPECT_EQ(status.num_devices_free(), 3);
  v1::ListWorkersResponse workers;
  ASSERT_TRUE(cluster_->ListWorkers(&other, {}, &workers).ok());
  ASSERT_EQ(workers.workers_size(), 1);
  EXPECT_EQ(workers.workers(0).state(), "ready");
}

TEST_F(JobServiceTest, AWorkerOfAnotherVersionIsRefusedAndToldTheRemedy) {
  Down();
  options_.version = "1.0.1";
  Up();
  FakeWorker worker(address_, "worker-0", "first");
  EXPECT_FALSE(worker.WaitForWelcome());
  const grpc::Status end = worker.WaitForEnd();
  EXPECT_EQ(end.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(net::GetErrorInfo(net::StatusFromGrpc(end)).reason, "VERSION_MISMATCH");
  EXPECT_THAT(end.error_message(), AllOf(HasSubstr("is version 1.0.0 and the coordinator is version 1.0.1"), HasSubstr("install ppft 1.0.1")));
  grpc::ClientContext context;
  v1::ListWorkersResponse workers;
  ASSERT_TRUE(cluster_->ListWorkers(&context, {}, &workers).ok());
  EXPECT_EQ(workers.workers_size(), 0);
  Down();
  options_.version = FakeWorker::kWorkerVersion;
  Up();
  worker.Connect(address_);
  EXPECT_TRUE(worker.WaitForWelcome());
}

TEST_F(JobServiceTest, AStreamThatDoesNotBeginWithHelloIsRefused) {
  auto stub = v1::WorkerService::NewStub(net::MakeChannel(address_));
  grpc::ClientContext context;
  auto stream = stub->Connect(&context);
  v1::WorkerMessage message;
  message.mutable_heartbeat();
  stream->Write(message);
  v1::CoordinatorMessage answer;
  EXPECT_FALSE(stream->Read(&answer));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST(CallGate, EveryMethodHasARole) {
  EXPECT_EQ(RoleOf("/ppft.v1.JobService/SubmitJob"), v1::ROLE_USER);
  EXPECT_EQ(RoleOf("/ppft.v1.WorkerService/Connect"), v1::ROLE_WORKER);
  EXPECT_EQ(RoleOf("/ppft.v1.JobService/Nothing"), v1::ROLE_UNSPECIFIED);
  EXPECT_TRUE(IsOpenToAll("/grpc.health.v1.Health/Check"));
  EXPECT_FALSE(IsOpenToAll("/ppft.v1.JobService/GetJob"));
  EXPECT_TRUE(CheckRoles({"ppft.v1.JobService", "ppft.v1.ClusterService", "ppft.v1.WorkerService", "ppft.v1.BlobService", "ppft.v1.DatasetService",
                          "ppft.v1.ModelService", "ppft.v1.ArtifactService"})
                  .ok());
  EXPECT_FALSE(CheckRoles({"ppft.v1.NoService"}).ok());
}

TEST(Listen, OnlyLoopbackWithoutTls) {
  const net::TlsFiles none, all{"ca", "cert", "key"}, some{"", "cert", ""};
  for (const char* fine : {"127.0.0.1:7070", "localhost:0", "[::1]:1", "127.8.8.8:65535"}) EXPECT_TRUE(CheckListen(fine, none).ok()) << fine;
  for (const char* open : {"0.0.0.0:7070", "10.0.0.1:7070", "[::]:7070", "example.org:1"}) {
    const absl::Status status = CheckListen(open, none);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << open;
    EXPECT_THAT(std::string(status.message()), HasSubstr("--tls_cert")) << open;
    EXPECT_TRUE(CheckListen(open, all).ok()) << open;
  }
  for (const char* wrong : {"", "7070", ":7070", "host:", "host:x", "host:65536", "host:-1"}) {
    EXPECT_EQ(CheckListen(wrong, none).code(), absl::StatusCode::kInvalidArgument) << wrong;
  }
  EXPECT_EQ(CheckListen("127.0.0.1:1", some).code(), absl::StatusCode::kInvalidArgument);
}

// The whole wiring, twice on one port.
TEST(Wiring, APortInUseIsNamed) {
  char one[] = "/tmp/ppft-wiring-XXXXXX", two[] = "/tmp/ppft-wiring-XXXXXX";
  CoordinatorOptions options;
  options.version = "test";
  options.data_dir = mkdtemp(one);
  options.listen = options.metrics_listen = "127.0.0.1:0";
  const auto first = Coordinator::Start(options);
  ASSERT_TRUE(first.ok()) << first.status();
  options.data_dir = mkdtemp(two);
  options.listen = (*first)->address();
  const auto second = Coordinator::Start(options);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr((*first)->address()));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("in use"));
  RemoveAll(one).IgnoreError();
  RemoveAll(two).IgnoreError();
}

}  // namespace
}  // namespace ppft::coordinator
