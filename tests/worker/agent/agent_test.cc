// The agent against a coordinator that runs in this process: real gRPC on loopback, real child processes.
#include "worker/agent/agent.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <filesystem>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/sha256.h"
#include "common/net/status.h"
#include "worker/agent/host_facts.h"

namespace ppft::agent {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(120);
constexpr int64_t kClockAhead = int64_t{3600} * 1000000000;  // of the coordinator

// The newest stream wins; reports are acknowledged only when the test wants it.
class FakeCoordinator final : public v1::WorkerService::Service {
 public:
  using Stream = grpc::ServerReaderWriter<v1::CoordinatorMessage, v1::WorkerMessage>;

  grpc::Status Connect(grpc::ServerContext* context, Stream* stream) override {
    v1::WorkerMessage message;
    if (!stream->Read(&message)) return grpc::Status::CANCELLED;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!version.empty()) {
        absl::Status mismatch = absl::FailedPreconditionError(absl::StrCat("the worker is version ", message.hello().version(), ", this is ", version));
        net::SetErrorInfo(&mismatch, {"VERSION_MISMATCH", {}});
        return net::ToGrpcStatus(mismatch);
      }
      if (name_taken) {
        ++turned_away;
        absl::Status taken = absl::AlreadyExistsError("the name is in use");
        net::SetErrorInfo(&taken, {"WORKER_NAME_IN_USE", {}});
        return net::ToGrpcStatus(taken);
      }
    }
    {
      std::lock_guard<std::mutex> lock(mutex);
      hellos.push_back(message.hello());
      current = stream;
      current_context = context;
      v1::CoordinatorMessage welcome;
      welcome.mutable_welcome()->set_acked_seq(acked);
      welcome.mutable_welcome()->mutable_heartbeat_interval()->set_nanos(100000000);
      stream->Write(welcome);
      if (directive.revision() > 0) WriteDirective();
    }
    while (stream->Read(&message)) {
      std::lock_guard<std::mutex> lock(mutex);
      if (message.has_heartbeat()) {
        running = {message.heartbeat().running().begin(), message.heartbeat().running().end()};
        heartbeat = message.heartbeat();
        v1::CoordinatorMessage answer;
        answer.mutable_clock()->set_sent_unix_nanos(heartbeat.sent_unix_nanos());
        answer.mutable_clock()->set_received_unix_nanos(absl::GetCurrentTimeNanos() + kClockAhead);
        answer.mutable_clock()->set_answered_unix_nanos(absl::GetCurrentTimeNanos() + kClockAhead);
        stream->Write(answer);
      }
      if (!message.has_report()) continue;
      if (message.report().report().report_case() == refuse) {
        ++refusals;
        current = nullptr;
        return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "not to be read");
      }
      reports.push_back(message.report());
      if (acknowledge) {
        acked = message.report().seq();
        v1::CoordinatorMessage ack;
        ack.mutable_ack()->set_seq(acked);
        stream->Write(ack);
      }
    }
    std::lock_guard<std::mutex> lock(mutex);
    if (current == stream) current = nullptr;
    return grpc::Status::OK;
  }

  grpc::Status FetchFile(grpc::ServerContext*, const v1::FetchFileRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) override {
    std::lock_guard<std::mutex> lock(mutex);
    if (request->sha256() == changed_model && request->check()) {
      absl::Status changed = absl::FailedPreconditionError("model.safetensors has changed");
      net::SetErrorInfo(&changed, {"MODEL_INVALID", {}});
      return net::ToGrpcStatus(changed);
    }
    if (request->sha256() == damaged && request->check()) {
      absl::Status status = absl::DataLossError("its content is damaged");
      net::SetErrorInfo(&status, {"CONTENT_DAMAGED", {}});
      return net::ToGrpcStatus(status);
    }
    const auto found = files.find(request->sha256());
    if (found == files.end()) {
      absl::Status missing = absl::NotFoundError("no such content");
      if (request->sha256() != unnamed) net::SetErrorInfo(&missing, {"CONTENT_MISSING", {}});
      if (!unmounted.empty()) {
        missing = absl::FailedPreconditionError(unmounted);
        net::SetErrorInfo(&missing, {"STORE_UNREADABLE", {}});
      }
      return net::ToGrpcStatus(missing);
    }
    v1::FileChunk chunk;
    chunk.set_offset(request->offset());
    chunk.set_data(found->second.substr(static_cast<size_t>(request->offset())));
    if (request->sha256() == damaged) chunk.mutable_data()->back() ^= 1;
    writer->Write(chunk);
    return grpc::Status::OK;
  }

  grpc::Status PutFile(grpc::ServerContext*, grpc::ServerReader<v1::PutFileRequest>* reader, v1::PutFileResponse* response) override {
    v1::PutFileRequest request;
    std::string content;
    while (reader->Read(&request)) content += request.data();
    std::lock_guard<std::mutex> lock(mutex);
    uploads.push_back(content);
    reports_before_upload = reports.size();
    response->set_received_bytes(static_cast<int64_t>(content.size()));
    return grpc::Status::OK;
  }

  void Direct(std::vector<v1::RankDirective> ranks) {
    std::lock_guard<std::mutex> lock(mutex);
    directive.set_revision(directive.revision() + 1);
    directive.clear_ranks();
    for (v1::RankDirective& rank : ranks) *directive.add_ranks() = std::move(rank);
    if (current != nullptr) WriteDirective();
  }

  v1::FileRef AddFile(const std::string& name, const std::string& content) {
    v1::FileRef file;
    file.set_name(name);
    file.set_sha256(Sha256Hex(content));
    file.set_size_bytes(static_cast<int64_t>(content.size()));
    std::lock_guard<std::mutex> lock(mutex);
    files[file.sha256()] = content;
    return file;
  }

  template <typename Check>
  bool WaitFor(const Check& check) {
    const absl::Time end = absl::Now() + kPatience;
    while (absl::Now() < end) {
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (check()) return true;
      }
      absl::SleepFor(absl::Milliseconds(10));
    }
    return false;
  }

  std::vector<std::string> Kinds() {
    std::vector<std::string> out;
    for (const v1::RankReport& report : reports) {
      const auto* field = v1::TrainerReport::descriptor()->FindFieldByNumber(report.report().report_case());
      out.push_back(field == nullptr ? "none" : field->name());
    }
    return out;
  }

  bool Has(const std::string& kind) {
    const std::vector<std::string> kinds = Kinds();
    return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
  }

  void EndStream() {
    std::lock_guard<std::mutex> lock(mutex);
    if (current != nullptr) current_context->TryCancel();
  }

  std::mutex mutex;
  bool acknowledge = true;
  bool name_taken = false;  // every hello is refused
  std::string version;      // not empty: every hello is of another one
  int turned_away = 0;
  std::string unnamed;                                                       // missing, and it does not say that it means its own content
  std::string unmounted;                                                     // not empty: why nothing that is missing can be told to be lost
  std::string damaged;                                                       // content that has changed on the coordinator's disk
  std::string changed_model;                                                 // content that the coordinator does not have any more
  v1::TrainerReport::ReportCase refuse = v1::TrainerReport::REPORT_NOT_SET;  // ends the stream that carries one
  int refusals = 0;
  grpc::ServerContext* current_context = nullptr;
  int64_t acked = 0;
  Stream* current = nullptr;
  v1::Directive directive;
  std::vector<v1::WorkerHello> hellos;
  std::vector<v1::RankKey> running;
  v1::Heartbeat heartbeat;  // the newest
  std::vector<v1::RankReport> reports;
  std::vector<std::string> uploads;
  size_t reports_before_upload = 0;
  std::map<std::string, std::string> files;

 private:
  void WriteDirective() {
    v1::CoordinatorMessage message;
    *message.mutable_directive() = directive;
    current->Write(message);
  }
};

class AgentTest : public ::testing::Test {
 protected:
  AgentTest() : metrics_("test", "w") {
    directory_ = std::filesystem::temp_directory_path() / absl::StrCat("ppft-agent-test-", getpid());
    std::filesystem::remove_all(directory_);
    Serve(0);
    AgentOptions options;
    options.coordinator = absl::StrCat("127.0.0.1:", port_);
    options.name = "w";
    options.address = "127.0.0.1";
    options.work_directory = directory_;
    options.trainer_binary = PPFT_FAKE_TRAINER;
    options.devices.resize(1);
    options.devices[0].set_id("cpu:0");
    agent_ = std::make_unique<Agent>(options, &metrics_);
    thread_ = std::thread([this] { status_ = agent_->Run(); });
  }

  ~AgentTest() override {
    agent_->Shutdown();
    thread_.join();
    server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
    std::filesystem::remove_all(directory_);
    EXPECT_EQ(status_.code(), expected_end_) << status_;
  }

  void Serve(int port) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(absl::StrCat("127.0.0.1:", port), grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(&coordinator_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
  }

  v1::RankDirective Rank(const std::string& behaviour, int64_t epoch = 1) {
    v1::RankDirective rank;
    rank.mutable_rank()->set_job_id(absl::StrCat("job-", behaviour));
    rank.mutable_rank()->set_epoch(epoch);
    rank.set_device("cpu:0");
    rank.mutable_spec()->set_name(behaviour);
    rank.mutable_spec()->mutable_limits()->mutable_stall_timeout()->set_seconds(600);  // no rank is hung because the machine is slow
    rank.mutable_plan()->add_ranks();
    *rank.mutable_train_tokens() = coordinator_.AddFile("train.safetensors", "tokens");
    v1::TensorRef* tensor = rank.add_tensors();
    tensor->set_name("model.norm.weight");
    *tensor->mutable_content() = coordinator_.AddFile("model.norm.weight", std::string(100, 'w'));
    v1::Endpoint* peer = rank.add_peers();
    peer->set_address("127.0.0.1:1");
    return rank;
  }

  // The pid that the fake trainer told as its port; 0 before.
  pid_t TrainerPid() {
    for (auto it = coordinator_.reports.rbegin(); it != coordinator_.reports.rend(); ++it) {
      if (!it->report().has_listening()) continue;
      const std::string& address = it->report().listening().address();
      int pid = 0;
      return absl::SimpleAtoi(address.substr(address.rfind(':') + 1), &pid) ? pid : 0;
    }
    return 0;
  }

  std::string directory_;
  metrics::WorkerMetrics metrics_;
  FakeCoordinator coordinator_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Agent> agent_;
  std::thread thread_;
  absl::Status status_;
  absl::StatusCode expected_end_ = absl::StatusCode::kOk;
};

TEST_F(AgentTest, ReportsComeInOrderAndACheckpointOnlyAfterItsFile) {
  coordinator_.Direct({Rank("steps")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready", "step", "step", "step", "checkpoint", "finished", "exited"));
  EXPECT_THAT(coordinator_.uploads, ElementsAre("checkpoint of job-steps"));
  EXPECT_LE(coordinator_.reports_before_upload, 5u) << "the checkpoint was reported before its file had arrived";
  EXPECT_EQ(coordinator_.reports[5].report().checkpoint().files(0).path(), "");
  EXPECT_EQ(coordinator_.reports.back().report().exited().status(), 0);
  for (size_t i = 0; i < coordinator_.reports.size(); ++i) EXPECT_EQ(coordinator_.reports[i].seq(), static_cast<int64_t>(i + 1));
}

// The coordinator was upgraded while a rank runs here: nothing that it does could ever be committed.
TEST_F(AgentTest, AnAgentOfAnotherVersionEndsWithTheRefusal) {
  coordinator_.Direct({Rank("wait")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  const pid_t pid = TrainerPid();
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.version = "2.0.0";
  }
  coordinator_.EndStream();
  expected_end_ = absl::StatusCode::kFailedPrecondition;
  thread_.join();  // without Shutdown
  EXPECT_THAT(std::string(status_.message()), HasSubstr("2.0.0"));
  EXPECT_NE(kill(pid, 0), 0) << "its trainer lives";
  thread_ = std::thread([] {});
}

TEST_F(AgentTest, ARankThatIsNoLongerWantedIsEndedAndNotReported) {
  coordinator_.Direct({Rank("wait")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  const pid_t pid = TrainerPid();
  ASSERT_GT(pid, 0);
  coordinator_.Direct({});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.running.empty(); }));
  EXPECT_NE(kill(pid, 0), 0) << "the heartbeat says that nothing runs, but the trainer lives";
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready"));
}

TEST_F(AgentTest, TheNextEpochStartsOnTheSameDeviceAfterTheOldOneIsGone) {
  coordinator_.Direct({Rank("wait", 1)});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  const pid_t first = TrainerPid();
  coordinator_.Direct({Rank("wait", 2)});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.reports.back().rank().epoch() == 2 && coordinator_.reports.back().report().has_ready(); }));
  EXPECT_NE(kill(first, 0), 0);
}

TEST_F(AgentTest, AKilledTrainerIsReportedWithItsSignal) {
  coordinator_.Direct({Rank("wait")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  ASSERT_EQ(kill(TrainerPid(), SIGKILL), 0);
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.running.empty(); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_EQ(coordinator_.reports.back().report().exited().signal(), SIGKILL);
}

TEST_F(AgentTest, ACrashCarriesTheLastWords) {
  coordinator_.Direct({Rank("crash")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_EQ(coordinator_.reports.back().report().exited().signal(), SIGABRT);
  EXPECT_THAT(coordinator_.reports.back().report().exited().detail(), HasSubstr("the last words"));
}

TEST_F(AgentTest, AHangEndsWithItsSection) {
  v1::RankDirective rank = Rank("hang");
  rank.mutable_spec()->mutable_limits()->mutable_stall_timeout()->set_seconds(5);  // it has to come to its section in this time
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready", "failure", "exited"));
  const v1::Reason& reason = coordinator_.reports[2].report().failure().reason();
  EXPECT_EQ(reason.code(), "STAGE_HUNG");
  EXPECT_THAT(reason.message(), HasSubstr("\"forward\", step 7"));
}

TEST_F(AgentTest, ATrainerThatNeverReadsALongStartIsEnded) {
  v1::RankDirective rank = Rank("deaf");
  rank.set_model_config(std::string(3 << 20, 'c'));  // more than the socket to the trainer holds
  rank.mutable_spec()->mutable_limits()->mutable_stall_timeout()->set_seconds(1);
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  ASSERT_THAT(coordinator_.Kinds(), ElementsAre("failure", "exited"));
  const v1::Reason& reason = coordinator_.reports[0].report().failure().reason();
  EXPECT_EQ(reason.code(), "STAGE_HUNG");
  EXPECT_THAT(reason.message(), HasSubstr("section \"starting\", step 0"));
  EXPECT_EQ(coordinator_.reports[1].report().exited().signal(), SIGKILL);
}

TEST_F(AgentTest, ATrainerThatNeverReadsIsEndedHoweverManyOrdersThereAre) {
  v1::RankDirective rank = Rank("deaf");
  rank.mutable_spec()->mutable_limits()->mutable_stall_timeout()->set_seconds(2);
  rank.mutable_trace()->set_num_steps(1);
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.current != nullptr; }));
  const absl::Time end = absl::Now() + kPatience;
  bool ended = false;
  for (int64_t trace = 1; !ended && absl::Now() < end; ++trace) {  // soon they are more than the socket to the trainer holds
    rank.mutable_trace()->set_id(trace);
    coordinator_.Direct({rank});
    absl::SleepFor(absl::Milliseconds(1));
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    ended = coordinator_.Has("exited");
  }
  ASSERT_TRUE(ended);
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  ASSERT_THAT(coordinator_.Kinds(), ElementsAre("failure", "exited"));
  EXPECT_EQ(coordinator_.reports[0].report().failure().reason().code(), "STAGE_HUNG");
}

TEST_F(AgentTest, AStoppedTrainerIsNamedAsItsNeighboursNameIt) {
  v1::RankDirective rank = Rank("wait");
  rank.mutable_spec()->mutable_limits()->mutable_stall_timeout()->set_seconds(5);
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  ASSERT_EQ(kill(TrainerPid(), SIGSTOP), 0);
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready", "failure", "exited"));
  const v1::Failure& failure = coordinator_.reports[2].report().failure();
  EXPECT_EQ(failure.reason().code(), "COMM_ERROR");
  EXPECT_EQ(failure.peer(), coordinator_.reports[2].rank().rank());
  EXPECT_THAT(failure.reason().message(), HasSubstr("is stopped"));
}

TEST_F(AgentTest, OneThatWaitsForItsPeersExportIsEndedWhereItIsStoppedAlone) {
  v1::RankDirective rank = Rank("await");
  rank.mutable_spec()->mutable_limits()->mutable_stall_timeout()->set_seconds(10);
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  absl::SleepFor(absl::Seconds(12));
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    ASSERT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready"));
  }
  ASSERT_EQ(kill(TrainerPid(), SIGSTOP), 0);
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  ASSERT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready", "failure", "exited"));
  const v1::Failure& failure = coordinator_.reports[2].report().failure();
  EXPECT_EQ(failure.reason().code(), "COMM_ERROR");
  EXPECT_THAT(failure.reason().message(), HasSubstr("is stopped"));
}

TEST_F(AgentTest, WhileTheCoordinatorIsAwayTheTrainerLivesAndReportsAreKept) {
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.acknowledge = false;
  }
  coordinator_.Direct({Rank("wait")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  const pid_t pid = TrainerPid();
  const int port = port_;
  server_->Shutdown(std::chrono::system_clock::now());
  server_.reset();
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.reports.clear();
    coordinator_.acknowledge = true;
  }
  Serve(port);
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); })) << "what was not acknowledged did not come again";
  EXPECT_EQ(kill(pid, 0), 0);
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  ASSERT_EQ(coordinator_.hellos.size(), 2u);
  EXPECT_EQ(coordinator_.hellos[0].incarnation(), coordinator_.hellos[1].incarnation());
  ASSERT_EQ(coordinator_.hellos[1].running_size(), 1);
  EXPECT_EQ(coordinator_.hellos[1].running(0).job_id(), "job-wait");
  EXPECT_EQ(coordinator_.reports[0].seq(), 1);
}

TEST_F(AgentTest, AFileThatTheCoordinatorDoesNotHaveIsAFailureNotAHang) {
  v1::RankDirective rank = Rank("steps");
  rank.mutable_train_tokens()->set_sha256(std::string(64, '0'));
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("failure"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.reports.back().report().failure().reason().message(), HasSubstr("train.safetensors"));
}

TEST_F(AgentTest, ATensorThatIsNotTheRegisteredOneIsTheModelsFailure) {
  v1::RankDirective rank = Rank("steps");
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.changed_model = rank.tensors(0).content().sha256();
    coordinator_.files[coordinator_.changed_model] = std::string(100, 'x');
  }
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("failure"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  const v1::Reason& reason = coordinator_.reports.back().report().failure().reason();
  EXPECT_EQ(reason.code(), "MODEL_INVALID");
  EXPECT_EQ(reason.owner(), "USER");
  EXPECT_THAT(reason.message(), HasSubstr("fetching model.norm.weight: model.safetensors has changed"));
  EXPECT_THAT(reason.remedy(), HasSubstr("ppctl models register"));
}

TEST_F(AgentTest, ACheckpointThatTheCoordinatorHasLostOrDamagedIsNamed) {
  for (const bool lost : {true, false}) {
    v1::RankDirective rank = Rank("steps", lost ? 1 : 2);
    rank.mutable_resume()->mutable_state()->set_step(40);
    const v1::FileRef file = coordinator_.AddFile("rank-0.safetensors", "a checkpoint");
    *rank.mutable_resume()->add_files() = file;
    {
      std::lock_guard<std::mutex> lock(coordinator_.mutex);
      coordinator_.reports.clear();
      if (lost) coordinator_.files.erase(file.sha256());
      if (!lost) coordinator_.damaged = file.sha256();
    }
    coordinator_.Direct({rank});
    ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("failure"); }));
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    const v1::Failure& failure = coordinator_.reports.back().report().failure();
    EXPECT_EQ(failure.reason().code(), "CHECKPOINT_CORRUPT");
    EXPECT_EQ(failure.step(), 40);
    EXPECT_THAT(failure.reason().message(), HasSubstr("fetching rank-0.safetensors"));
  }
}

TEST_F(AgentTest, TrainingDataThatIsDamagedOnTheCoordinatorsDiskIsTheOperators) {
  const v1::RankDirective rank = Rank("steps");
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.damaged = rank.train_tokens().sha256();
  }
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("failure"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  const v1::Reason& reason = coordinator_.reports.back().report().failure().reason();
  EXPECT_EQ(reason.code(), "STORE_UNREADABLE");
  EXPECT_EQ(reason.owner(), "OPERATOR");
  EXPECT_THAT(reason.message(), HasSubstr("fetching train.safetensors: its content is damaged"));
}

TEST_F(AgentTest, AnAdapterThatIsDamagedOnTheCoordinatorsDiskIsToBeUploadedAgain) {
  v1::RankDirective rank = Rank("steps");
  *rank.add_init_adapter() = coordinator_.AddFile("adapter_model.safetensors", "an adapter");
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.damaged = rank.init_adapter(0).sha256();
  }
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("failure"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  const v1::Reason& reason = coordinator_.reports.back().report().failure().reason();
  EXPECT_EQ(reason.code(), "STORE_UNREADABLE");
  EXPECT_THAT(reason.message(), HasSubstr("fetching adapter_model.safetensors"));
  EXPECT_THAT(reason.remedy(), HasSubstr("upload the adapter again"));
}

// What is missing on this host, or told by anything else than the coordinator's store, takes no checkpoint away.
TEST_F(AgentTest, OnlyTheCoordinatorsOwnWordMakesACheckpointLost) {
  for (const bool unmounted : {false, true}) {
    v1::RankDirective rank = Rank("steps", unmounted ? 1 : 2);
    rank.mutable_resume()->mutable_state()->set_step(40);
    const v1::FileRef file = coordinator_.AddFile("rank-0.safetensors", "a checkpoint");
    *rank.mutable_resume()->add_files() = file;
    {
      std::lock_guard<std::mutex> lock(coordinator_.mutex);
      coordinator_.reports.clear();
      coordinator_.files.erase(file.sha256());
      coordinator_.unnamed = file.sha256();
      coordinator_.unmounted = unmounted ? "blobs/ab is not there" : "";
    }
    coordinator_.Direct({rank});
    ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("failure"); }));
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    const v1::Reason& reason = coordinator_.reports.back().report().failure().reason();
    EXPECT_EQ(reason.code(), unmounted ? "STORE_UNREADABLE" : "COMM_ERROR");
    EXPECT_THAT(reason.message(), HasSubstr("fetching rank-0.safetensors"));
  }
}

TEST_F(AgentTest, ACacheThatWasDeletedUnderTheWorkerCostsNoCheckpoint) {
  coordinator_.Direct({Rank("steps", 1)});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::filesystem::remove_all(directory_ + "/cache");
  v1::RankDirective rank = Rank("steps", 2);
  rank.mutable_resume()->mutable_state()->set_step(40);
  *rank.mutable_resume()->add_files() = coordinator_.AddFile("rank-0.safetensors", "a checkpoint");
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.reports.clear();
  }
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited") || coordinator_.Has("failure"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.Kinds(), testing::Not(testing::Contains("failure")));
}

TEST_F(AgentTest, ATraceIsPassedToTheTrainerAndItsAnswerBack) {
  v1::RankDirective rank = Rank("trace");
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  rank.mutable_trace()->set_id(77);
  rank.mutable_trace()->set_num_steps(3);
  coordinator_.Direct({rank});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("trace"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_EQ(coordinator_.reports.back().report().trace().id(), 77);
}

TEST_F(AgentTest, HeartbeatsTellTheClocksOffset) {
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.heartbeat.has_clock(); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_NEAR(static_cast<double>(coordinator_.heartbeat.clock().offset_nanos()), kClockAhead,
              static_cast<double>(coordinator_.heartbeat.clock().error_nanos()) + 1);
  EXPECT_GT(coordinator_.heartbeat.disk_free_bytes(), 0);
}

TEST_F(AgentTest, AReportThatNoMessageHoldsIsAFailureAndTheLinkLives) {
  coordinator_.Direct({Rank("big")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready", "failure", "exited"));
  const v1::Reason& reason = coordinator_.reports[2].report().failure().reason();
  EXPECT_EQ(reason.code(), "INTERNAL");
  EXPECT_THAT(reason.message(), HasSubstr("a report (exported) of rank 0 cannot be sent: it has 8"));
  EXPECT_EQ(coordinator_.hellos.size(), 1u);
}

TEST_F(AgentTest, AReportThatTheCoordinatorRefusesIsAFailureAndNotSentForEver) {
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.refuse = v1::TrainerReport::kFinished;
  }
  coordinator_.Direct({Rank("steps")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("exited"); }));
  std::lock_guard<std::mutex> lock(coordinator_.mutex);
  EXPECT_THAT(coordinator_.Kinds(), ElementsAre("listening", "ready", "step", "step", "step", "checkpoint", "failure", "exited"));
  EXPECT_THAT(coordinator_.reports[6].report().failure().reason().message(), HasSubstr("not to be read"));
  EXPECT_EQ(coordinator_.refusals, 3);
}

TEST_F(AgentTest, AnAgentWhoseNameIsTakenLetsItsRanksGoAndKeepsTrying) {
  coordinator_.Direct({Rank("wait")});
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.Has("ready"); }));
  const pid_t pid = TrainerPid();
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.directive.clear_ranks();
    coordinator_.name_taken = true;
  }
  coordinator_.EndStream();
  ASSERT_TRUE(coordinator_.WaitFor([&] { return coordinator_.turned_away >= 3; }));
  ASSERT_TRUE(coordinator_.WaitFor([&] { return kill(pid, 0) != 0; }));
  {
    std::lock_guard<std::mutex> lock(coordinator_.mutex);
    coordinator_.name_taken = false;
  }
  EXPECT_TRUE(coordinator_.WaitFor([&] { return coordinator_.hellos.size() == 2; })) << "the name is free again";
}

TEST(HostFacts, FoldersOfOneHostHaveNamesOfTheirOwn) {
  const std::string name = NameOfFolder("host", "/var/lib/ppft/one");
  EXPECT_EQ(NameOfFolder("host", "/var/lib/ppft/two/../one"), name);
  EXPECT_NE(NameOfFolder("host", "/var/lib/ppft/two"), name);
  EXPECT_THAT(name, HasSubstr("host-"));
  EXPECT_EQ(NameOfFolder(std::string(64, 'h'), "/x").size(), 63u);
}

TEST_F(AgentTest, ASecondAgentOnTheSameFolderIsRefused) {
  ASSERT_TRUE(coordinator_.WaitFor([&] { return !coordinator_.hellos.empty(); }));
  AgentOptions options;
  options.coordinator = absl::StrCat("127.0.0.1:", port_);
  options.work_directory = directory_;
  Agent second(options, &metrics_);
  const absl::Status status = second.Run();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr(directory_));
}

}  // namespace
}  // namespace ppft::agent
