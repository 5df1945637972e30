// The room as clients see it: uploads, datasets, registration with everything that must be refused, files for workers. Through gRPC on loopback,
// with a real store and the real ppft-prepare.
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/model/peft.h"
#include "common/net/status.h"
#include "coordinator/artifacts/artifacts.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "ppft/v1/artifact.grpc.pb.h"
#include "ppft/v1/blob.grpc.pb.h"
#include "ppft/v1/dataset.grpc.pb.h"
#include "ppft/v1/model.grpc.pb.h"
#include "tests/coordinator/artifacts/inline_controller.h"
#include "tests/coordinator/artifacts/tiny_model.h"

namespace ppft::coordinator {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

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

constexpr char kCancelledJob[] = "job-cancelled";

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
    channel_ = grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials());
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
  std::unique_ptr<InlineController> controller_;
  std::unique_ptr<Artifacts> artifacts_;
  std::unique_ptr<WorkerFace> worker_face_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(ServicesTest, UploadMakesADatasetThatSurvivesARestart) {
  const std::string bytes(3 << 20, 'd');
  v1::Dataset dataset;
  EXPECT_EQ(CreateDataset("train.jsonl", bytes, &dataset).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  ASSERT_TRUE(Upload(bytes).ok());
  ASSERT_TRUE(Upload(bytes).ok());
  const grpc::Status created = CreateDataset("train.jsonl", bytes, &dataset, "same");
  ASSERT_TRUE(created.ok()) << created.error_message();
  EXPECT_EQ(dataset.id(), "ds-" + Sha256Hex(bytes).substr(0, 16));
  v1::Dataset again;
  EXPECT_TRUE(CreateDataset("train.jsonl", bytes, &again, "same").ok());
  EXPECT_EQ(CreateDataset("other.jsonl", bytes, &again, "same").error_code(), grpc::StatusCode::ALREADY_EXISTS);
  Stop();
  Start();
  grpc::ClientContext context;
  v1::GetDatasetRequest get;
  get.set_id("train.jsonl");  // the only one of that name
  ASSERT_TRUE(v1::DatasetService::NewStub(channel_)->GetDataset(&context, get, &again).ok());
  EXPECT_EQ(again.sha256(), dataset.sha256());
}

TEST_F(ServicesTest, EmptyDatasetIsRefused) {
  ASSERT_TRUE(Upload("").ok());
  v1::Dataset dataset;
  const grpc::Status status = CreateDataset("bad.jsonl", "", &dataset);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("bad.jsonl: the file is empty"));
}

TEST_F(ServicesTest, ListsComeInPages) {
  v1::Dataset dataset;
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(Upload(absl::StrCat("data", i)).ok());
    ASSERT_TRUE(CreateDataset("d", absl::StrCat("data", i), &dataset).ok());
  }
  v1::ListDatasetsRequest request;
  request.set_page_size(2);
  std::vector<std::string> ids;
  for (int pages = 1;; ++pages) {
    grpc::ClientContext context;
    v1::ListDatasetsResponse response;
    ASSERT_TRUE(v1::DatasetService::NewStub(channel_)->ListDatasets(&context, request, &response).ok());
    for (const v1::Dataset& one : response.datasets()) ids.push_back(one.id());
    request.set_page_token(response.next_page_token());
    if (response.next_page_token().empty()) {
      EXPECT_EQ(pages, 3);
      break;
    }
  }
  EXPECT_EQ(ids.size(), 5u);
}

TEST_F(ServicesTest, RegistersAFolderAndServesItsTensorsAfterARestart) {
  const std::string folder = JoinPath(dir_, "root/tiny");
  PutTinyModel(folder);
  v1::Model model;
  grpc::Status status = Register("tiny", folder, &model);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(model.num_layers(), 2);
  EXPECT_EQ(model.dtype(), "F32");
  EXPECT_GT(model.num_parameters(), 0);
  status = Register("tiny", "tiny");  // the same content, relative to the root
  EXPECT_TRUE(status.ok()) << status.error_message();
  const auto record = controller_->Run([](JobStore& store) { return store.GetModel("tiny"); });
  ASSERT_TRUE(record.ok());
  EXPECT_EQ(record->tensors_size(), 2 * 9 + 2);
  EXPECT_EQ(record->files_size(), 3);
  Stop();
  Start();
  const v1::ModelRecord::Tensor& tensor = record->tensors(4);
  std::string bytes;
  status = Fetch(tensor.tensor().content().sha256(), 0, &bytes);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(Sha256Hex(bytes), tensor.tensor().content().sha256());
  std::string rest;
  ASSERT_TRUE(Fetch(tensor.tensor().content().sha256(), 100, &rest).ok());
  EXPECT_EQ(rest, bytes.substr(100));
  ASSERT_TRUE(Fetch(tensor.tensor().content().sha256(), static_cast<int64_t>(bytes.size()), &rest).ok());
  EXPECT_EQ(rest, "");
  EXPECT_EQ(Fetch(tensor.tensor().content().sha256(), 1 << 20, &rest).error_code(), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(Fetch(Sha256Hex("nothing"), 0, &rest).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Fetch("../../etc/passwd", 0, &rest).error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  // Other content under the same name.
  PutWeights(folder, "model.safetensors", ParsedTinyConfig(), [](model::TensorInfo&, std::string& raw) { return raw[0] ^= 1, true; });
  EXPECT_EQ(Register("tiny", folder).error_code(), grpc::StatusCode::ALREADY_EXISTS);
}

TEST_F(ServicesTest, AModelThatChangedAfterItsRegistrationIsRefusedWithFileAndTensor) {
  const std::string folder = JoinPath(dir_, "root/tiny");
  const std::string file = JoinPath(folder, "model.safetensors");
  PutTinyModel(folder);
  grpc::Status status = Register("tiny", folder);
  ASSERT_TRUE(status.ok()) << status.error_message();
  const auto record = controller_->Run([](JobStore& store) { return store.GetModel("tiny"); });
  ASSERT_TRUE(record.ok());
  ASSERT_EQ(record->weight_files_size(), 1);
  const v1::TensorRef& tensor = record->tensors(4).tensor();
  const auto set_time = [&](int64_t nanos) {
    const timespec time = absl::ToTimespec(absl::FromUnixNanos(nanos));
    const timespec times[2] = {time, time};
    ASSERT_EQ(utimensat(AT_FDCWD, file.c_str(), times, 0), 0);
  };
  const auto expect_refused = [&](const absl::Status& refused) {
    EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
    EXPECT_EQ(net::GetErrorInfo(refused).reason, "MODEL_INVALID");
    EXPECT_THAT(std::string(refused.message()), HasSubstr(file));
    EXPECT_THAT(std::string(refused.message()), HasSubstr("ppctl models register"));
  };
  std::string bytes;
  set_time(record->weight_files(0).modified_unix_nanos() + 1000000000);  // touched, with the same bytes
  EXPECT_TRUE(Fetch(tensor.content().sha256(), 0, &bytes).ok());
  EXPECT_TRUE(artifacts_->CheckModel(*record).ok());

  PutWeights(folder, "model.safetensors", ParsedTinyConfig(), [&](model::TensorInfo& info, std::string& raw) {
    if (info.name == tensor.name()) raw[0] = static_cast<char>(raw[0] ^ 1);
    return true;
  });
  expect_refused(artifacts_->CheckModel(*record));
  EXPECT_THAT(std::string(artifacts_->CheckModel(*record).message()), HasSubstr(tensor.name()));
  expect_refused(net::StatusFromGrpc(Fetch(tensor.content().sha256(), 0, &bytes)));
  set_time(record->weight_files(0).modified_unix_nanos());  // a change that hides its time: seen when the worker says what it got
  EXPECT_TRUE(Fetch(tensor.content().sha256(), 0, &bytes).ok());
  EXPECT_NE(Sha256Hex(bytes), tensor.content().sha256());
  status = Fetch(tensor.content().sha256(), 0, &bytes, /*check=*/true);
  expect_refused(net::StatusFromGrpc(status));
  EXPECT_THAT(status.error_message(), HasSubstr(tensor.name()));
  EXPECT_TRUE(Fetch(record->tensors(5).tensor().content().sha256(), 0, &bytes, /*check=*/true).ok()) << "another tensor is as it was";

  ASSERT_TRUE(RemoveAll(folder).ok());
  const absl::Status gone = artifacts_->CheckModel(*record);
  EXPECT_EQ(net::GetErrorInfo(gone).reason, "MODEL_INVALID");
  EXPECT_THAT(std::string(gone.message()), HasSubstr(folder + ": the folder is gone"));
  // The same content in another place is as good.
  PutTinyModel(JoinPath(dir_, "root/copy"));
  ASSERT_TRUE(Register("copy", "copy").ok());
  EXPECT_TRUE(Fetch(tensor.content().sha256(), 0, &bytes).ok());
  EXPECT_EQ(Sha256Hex(bytes), tensor.content().sha256());
}

TEST_F(ServicesTest, RegistersShardsAndUploads) {
  const std::string folder = JoinPath(dir_, "root/shards");
  PutTinyModel(folder);
  const model::ModelConfig config = ParsedTinyConfig();
  std::filesystem::remove(JoinPath(folder, "model.safetensors"));
  std::map<std::string, std::string> map;
  const auto part = [&](bool first, const std::string& name) {
    PutWeights(folder, name, config, [&](model::TensorInfo& info, std::string&) {
      const bool mine = (info.name.find("layers.0") != std::string::npos) == first;
      if (mine) map[info.name] = name;
      return mine;
    });
  };
  part(true, "model-00001-of-00002.safetensors");
  part(false, "model-00002-of-00002.safetensors");
  PutFile(folder, "model.safetensors.index.json", model::SafetensorsIndexText(map, 1));
  grpc::Status status = Register("shards", folder);
  ASSERT_TRUE(status.ok()) << status.error_message();

  v1::RegisterModelRequest request;
  request.set_name("uploaded");
  const auto names = ListDir(folder);
  for (const std::string& name : *names) {
    const std::string bytes = *ReadFile(JoinPath(folder, name));
    ASSERT_TRUE(Upload(bytes).ok());
    v1::FileRef* file = request.mutable_files()->add_files();
    file->set_name(name);
    file->set_sha256(Sha256Hex(bytes));
    file->set_size_bytes(static_cast<int64_t>(bytes.size()));
  }
  v1::Model model;
  status = Register(request, &model);
  ASSERT_TRUE(status.ok()) << status.error_message();
  status = Register(request, &model);  // again, with another request_id
  ASSERT_TRUE(status.ok()) << status.error_message();
  Stop();
  Start();
  EXPECT_EQ(NumModels(), 2);
  std::filesystem::remove_all(folder);
  const auto record = controller_->Run([](JobStore& store) { return store.GetModel("uploaded"); });
  EXPECT_TRUE(PathExists(record->model().path())) << record->model().path();

  // The index and the files disagree.
  PutTinyModel(folder);
  std::filesystem::remove(JoinPath(folder, "model.safetensors"));
  part(true, "model-00001-of-00002.safetensors");
  part(false, "model-00002-of-00002.safetensors");
  map["model.norm.weight"] = "model-00001-of-00002.safetensors";
  PutFile(folder, "model.safetensors.index.json", model::SafetensorsIndexText(map, 1));
  EXPECT_THAT(Register("bad", folder).error_message(), HasSubstr("model.norm.weight"));
  map["model.norm.weight"] = "model-00003-of-00002.safetensors";
  PutFile(folder, "model.safetensors.index.json", model::SafetensorsIndexText(map, 1));
  EXPECT_THAT(Register("bad", folder).error_message(), HasSubstr("not in the folder"));
}

// What is wrong with an upload is told in the user's words: no path of the coordinator's.
TEST_F(ServicesTest, ABadUploadIsToldWithTheUsersOwnFolder) {
  const std::string folder = JoinPath(dir_, "root/mine");
  const auto upload = [&](const std::string& source) {
    v1::RegisterModelRequest request;
    request.set_name(absl::StrCat("bad-", ++counter_));
    request.mutable_files()->set_source(source);
    const auto names = ListDir(folder);
    for (const std::string& name : *names) {
      const std::string bytes = *ReadFile(JoinPath(folder, name));
      EXPECT_TRUE(Upload(bytes).ok());
      v1::FileRef* file = request.mutable_files()->add_files();
      file->set_name(name);
      file->set_sha256(Sha256Hex(bytes));
      file->set_size_bytes(static_cast<int64_t>(bytes.size()));
    }
    v1::Model model;
    const grpc::Status status = Register(request, &model);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), ::testing::Not(HasSubstr(JoinPath(dir_, "data"))));
    return status.error_message();
  };
  PutTinyModel(folder);
  const std::string whole = *ReadFile(JoinPath(folder, "model.safetensors"));
  PutFile(folder, "model.safetensors", whole.substr(0, whole.size() - 40));
  EXPECT_THAT(upload("../my models/mine"), HasSubstr("../my models/mine/model.safetensors: "));
  EXPECT_THAT(upload(""), ::testing::StartsWith("model.safetensors: "));
  PutTinyModel(folder);
  PutFile(folder, "tokenizer.json", "{}");
  EXPECT_THAT(upload("mine"), HasSubstr("mine"));
}

TEST_F(ServicesTest, AWorkersFileThatHasNoRoomPausesItsJobAndLeavesNothing) {
  controller_->SetEpoch("job-1", 3);
  const std::string bytes(300000, 'c');
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{200000, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const grpc::Status status = Put(3, bytes, Sha256Hex(bytes));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(controller_->disk_full(), HasSubstr("job-1 needs"));
  EXPECT_THAT(controller_->disk_full(), HasSubstr("a file of 300000 bytes"));
  EXPECT_TRUE(ListDir(JoinPath(dir_, "data/partial"))->empty());
  EXPECT_TRUE(Put(3, bytes, Sha256Hex(bytes)).ok());
}

struct BadModel {
  const char* what;
  std::function<void(const std::string& folder)> damage;
  const char* word;
};

void DamageHeader(const std::string& folder, const std::function<void(json&)>& edit) {
  const std::string path = JoinPath(folder, "model.safetensors");
  const std::string raw = *ReadFile(path);
  const auto header = *model::ReadSafetensorsHeader(path);
  json object = json::parse(raw.substr(8, static_cast<size_t>(header.data_offset - 8)));
  edit(object);
  const std::string text = object.dump();
  std::string size(8, '\0');
  for (int i = 0; i < 8; ++i) size[i] = static_cast<char>(text.size() >> (8 * i));
  PutFile(folder, "model.safetensors", size + text + raw.substr(static_cast<size_t>(header.data_offset)));
}

void ReplaceConfig(const std::string& folder, const char* key, const json& value) {
  json config = TinyConfig();
  config[key] = value;
  PutFile(folder, "config.json", config.dump());
}

TEST_F(ServicesTest, AHeadOfItsOwnIsUsedAlthoughTheConfigTiesIt) {
  const auto with_head = [&](const std::string& name, bool same) {
    const std::string folder = JoinPath(dir_, "root/" + name);
    PutTinyModel(folder);
    ReplaceConfig(folder, "tie_word_embeddings", true);
    model::ModelConfig untied = ParsedTinyConfig();
    untied.tie_word_embeddings = false;
    std::string embedding;
    PutWeights(folder, "model.safetensors", untied, [&](model::TensorInfo& info, std::string& raw) {
      if (info.name == model::kEmbeddingName) embedding = raw;
      if (info.name == model::kHeadName && same) raw = embedding;
      return true;
    });
    v1::Model model;
    const grpc::Status status = Register(name, folder, &model);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return controller_->Run([&](JobStore& store) { return store.GetModel(name); }).value();
  };
  const v1::ModelRecord copy = with_head("copy", true);
  EXPECT_TRUE(copy.model().tie_word_embeddings());
  EXPECT_EQ(copy.tensors_size(), 2 * 9 + 2) << "a copy of the embedding is not served";
  const v1::ModelRecord own = with_head("own", false);
  EXPECT_FALSE(own.model().tie_word_embeddings());
  EXPECT_EQ(own.tensors_size(), 2 * 9 + 3);
  EXPECT_FALSE(model::ParseModelConfig(own.config(), "config.json")->tie_word_embeddings);
}

TEST_F(ServicesTest, BadModelsAreRefusedWithTheirCauseAndLeaveNothing) {
  const model::ModelConfig config = ParsedTinyConfig();
  const auto remove = [](const std::string& name) { return [name](const std::string& d) { std::filesystem::remove(JoinPath(d, name)); }; };
  const auto weights = [&config](std::function<bool(model::TensorInfo&, std::string&)> edit) {
    return [edit, &config](const std::string& d) { PutWeights(d, "model.safetensors", config, edit); };
  };
  const auto put_value = [](const char* tensor, std::string value) {
    return [=](model::TensorInfo& info, std::string& raw) {
      if (info.name == tensor) raw.replace(raw.size() - value.size(), value.size(), value);
      return true;
    };
  };
  const BadModel cases[] = {
      {"truncated",
       [](const std::string& d) {
         const auto raw = *ReadFile(JoinPath(d, "model.safetensors"));
         PutFile(d, "model.safetensors", raw.substr(0, raw.size() - 1000));
       },
       "truncated"},
      {"header longer than the file", [](const std::string& d) { PutFile(d, "model.safetensors", std::string("\0\0\0\0\0\0\0\x10{}", 10)); }, "truncated"},
      {"shape beyond the data", [](const std::string& d) { DamageHeader(d, [](json& h) {
                                                             h["model.norm.weight"]["shape"] = {16, int64_t{1} << 40};
                                                           }); },
       "model.norm.weight"},
      {"shape that overflows",
       [](const std::string& d) { DamageHeader(d, [](json& h) {
                                    h["model.norm.weight"]["shape"] = {int64_t{1} << 40, int64_t{1} << 40};
                                  }); }, "too large"},
      {"overlap",
       [](const std::string& d) {
         DamageHeader(
             d, [](json& h) { h["model.layers.1.self_attn.v_proj.weight"]["data_offsets"] = h["model.layers.1.self_attn.k_proj.weight"]["data_offsets"]; });
       },
       "overlap"},
      {"missing in the header", [](const std::string& d) { DamageHeader(d, [](json& h) { h.erase("model.layers.1.mlp.up_proj.weight"); }); },
       "belong to no tensor"},
      {"missing tensor", weights([](model::TensorInfo& info, std::string&) { return info.name != "model.layers.1.mlp.up_proj.weight"; }),
       "model.layers.1.mlp.up_proj.weight is missing"},
      {"foreign tensor", weights([](model::TensorInfo& info, std::string&) {
         if (info.name == "model.norm.weight") info.name = "model.norm.bias";
         return true;
       }),
       "model.norm.weight is missing"},
      {"NaN", weights(put_value("model.layers.0.mlp.down_proj.weight", std::string("\0\0\xc0\x7f", 4))), "model.layers.0.mlp.down_proj.weight holds NaN"},
      {"infinity", weights(put_value("model.norm.weight", std::string("\0\0\x80\xff", 4))), "model.norm.weight holds NaN"},
      {"integers", weights([](model::TensorInfo& info, std::string&) {
         if (info.name == "model.norm.weight") info.dtype = "I32";
         return true;
       }),
       "I32"},
      {"another kind", [](const std::string& d) { ReplaceConfig(d, "architectures", {"BertForMaskedLM"}); }, "LlamaForCausalLM"},
      {"other sizes", [](const std::string& d) { ReplaceConfig(d, "hidden_size", 32); }, "config.json asks for"},
      {"other number of layers", [](const std::string& d) { ReplaceConfig(d, "num_hidden_layers", 3); }, "model.layers.2."},
      {"fewer layers", [](const std::string& d) { ReplaceConfig(d, "num_hidden_layers", 1); }, "does not belong"},
      {"untied without a head", [](const std::string& d) { ReplaceConfig(d, "tie_word_embeddings", false); }, "lm_head.weight is missing"},
      {"no weights", remove("model.safetensors"), "no weights"},
      {"pickle only", [](const std::string& d) { std::filesystem::rename(JoinPath(d, "model.safetensors"), JoinPath(d, "pytorch_model.bin")); }, "safetensors"},
      {"no config", remove("config.json"), "config.json: is missing"},
      {"broken config", [](const std::string& d) { PutFile(d, "config.json", "{"); }, "not valid JSON"},
      {"no tokenizer", remove("tokenizer.json"), "tokenizer"},
      {"broken tokenizer", [](const std::string& d) { PutFile(d, "tokenizer.json", "{}"); }, "tokenizer"},
      {"too many ids",
       [](const std::string& d) {
         json t = TinyTokenizer();
         t["model"]["vocab"]["zzz"] = 70000;
         PutFile(d, "tokenizer.json", t.dump());
       },
       "70000"},
      {"config is a FIFO",
       [](const std::string& d) {
         std::filesystem::remove(JoinPath(d, "config.json"));
         ASSERT_EQ(mkfifo(JoinPath(d, "config.json").c_str(), 0600), 0);
       },
       "not a regular file"},
      {"weights outside the root",
       [&](const std::string& d) {
         std::filesystem::rename(JoinPath(d, "model.safetensors"), JoinPath(dir_, "stolen.safetensors"));
         std::filesystem::create_symlink("../../stolen.safetensors", JoinPath(d, "model.safetensors"));
       },
       "leads out of the model root"},
  };
  for (const BadModel& c : cases) {
    SCOPED_TRACE(c.what);
    const std::string folder = JoinPath(dir_, "root/bad");
    std::filesystem::remove_all(folder);
    PutTinyModel(folder);
    c.damage(folder);
    const grpc::Status status = Register("bad", folder);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(c.word));
    EXPECT_THAT(status.error_message(), HasSubstr("bad"));  // the folder
    EXPECT_EQ(NumModels(), 0);
  }
}

TEST_F(ServicesTest, PathsOutsideTheRootsAreRefused) {
  PutTinyModel(JoinPath(dir_, "outside"));
  std::filesystem::create_directory_symlink("../outside", JoinPath(dir_, "root/link"));
  for (const std::string& path : {JoinPath(dir_, "outside"), std::string("../outside"), std::string("link"), JoinPath(dir_, "root/link"), std::string("/etc"),
                                  std::string(""), std::string("nowhere"), JoinPath(dir_, "root/../outside"), std::string("a\0b", 3)}) {
    const grpc::Status status = Register("x", path);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << path;
    EXPECT_THAT(status.error_message(), HasSubstr("model root")) << path;
  }
  for (const char* name : {"", "..", "a/b", ".x", "a b"}) EXPECT_EQ(Register(name, "x").error_code(), grpc::StatusCode::INVALID_ARGUMENT) << name;
  // A link that stays inside is fine: hub caches are made of them.
  PutTinyModel(JoinPath(dir_, "root/real"));
  std::filesystem::create_directory(JoinPath(dir_, "root/snapshot"));
  const auto names = ListDir(JoinPath(dir_, "root/real"));
  for (const std::string& name : *names) std::filesystem::create_symlink("../real/" + name, JoinPath(dir_, "root/snapshot/" + name));
  const grpc::Status status = Register("snapshot", "snapshot");
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST_F(ServicesTest, WorkersPutFilesOfTheCurrentEpochOnly) {
  controller_->SetEpoch("job-1", 3);
  const std::string bytes = "checkpoint bytes";
  const std::string sha = Sha256Hex(bytes);
  EXPECT_EQ(Put(2, bytes, sha).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  std::string back;
  EXPECT_EQ(Fetch(sha, 0, &back).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Put(3, "checkpoint bytez", sha).error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_EQ(Fetch(sha, 0, &back).error_code(), grpc::StatusCode::NOT_FOUND);
  ASSERT_TRUE(Put(3, bytes, sha).ok());
  ASSERT_TRUE(Put(3, bytes, sha).ok());
  ASSERT_TRUE(Fetch(sha, 0, &back).ok());
  EXPECT_EQ(back, bytes);
}

TEST_F(ServicesTest, AJobWithoutAFinalModelIsToldByItsCheckpoints) {
  const auto answer = [this] {
    grpc::ClientContext context;
    v1::GetManifestRequest request;
    request.set_job_id(kCancelledJob);
    v1::ArtifactManifest manifest;
    const grpc::Status status = v1::ArtifactService::NewStub(channel_)->GetManifest(&context, request, &manifest);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    return status.error_message();
  };
  EXPECT_THAT(answer(), HasSubstr("it is CANCELLED and has no checkpoint"));
  ASSERT_TRUE(controller_
                  ->Run([](JobStore& store) -> absl::Status {
                    v1::JobRecord record;
                    record.mutable_job()->set_id(kCancelledJob);
                    record.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_CANCELLED);
                    record.mutable_job()->mutable_status()->set_attempt_epoch(1);
                    PPFT_RETURN_IF_ERROR(store.InsertJob(record));
                    v1::CheckpointManifest checkpoint;
                    checkpoint.set_job_id(kCancelledJob);
                    checkpoint.mutable_state()->set_step(3);
                    return store.PutCheckpoint(checkpoint);
                  })
                  .ok());
  EXPECT_THAT(answer(), HasSubstr("--checkpoint latest"));
}

TEST_F(ServicesTest, ADamagedBestCheckpointIsNotReplacedInSilence) {
  const auto ask = [this](const std::string& checkpoint) {
    grpc::ClientContext context;
    v1::GetManifestRequest request;
    request.set_job_id(kCancelledJob);
    request.set_checkpoint(checkpoint);
    v1::ArtifactManifest manifest;
    return v1::ArtifactService::NewStub(channel_)->GetManifest(&context, request, &manifest);
  };
  const auto put = [this](int64_t step, const std::string& damage) {
    return controller_->Run([&](JobStore& store) {
      v1::CheckpointManifest checkpoint;
      checkpoint.set_job_id(kCancelledJob);
      checkpoint.mutable_state()->set_step(step);
      checkpoint.set_best(true);
      checkpoint.set_damage(damage);
      return store.PutCheckpoint(checkpoint);
    });
  };
  ASSERT_TRUE(controller_
                  ->Run([](JobStore& store) {
                    v1::JobRecord record;
                    record.mutable_job()->set_id(kCancelledJob);
                    record.mutable_job()->mutable_status()->set_state(v1::JOB_STATE_CANCELLED);
                    record.mutable_job()->mutable_status()->set_attempt_epoch(1);
                    return store.InsertJob(record);
                  })
                  .ok());
  ASSERT_TRUE(put(40, "rank-1.safetensors is damaged").ok());
  grpc::Status status = ask("best");
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(),
              AllOf(HasSubstr("the best checkpoint, of step 40, cannot be used: rank-1.safetensors is damaged"), HasSubstr("no other")));
  ASSERT_TRUE(put(20, "").ok());
  status = ask("best");
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("--checkpoint step:20"));
  EXPECT_THAT(ask("step:40").error_message(), HasSubstr("the checkpoint of step 40, cannot be used"));
  ASSERT_TRUE(put(60, "").ok());
  EXPECT_THAT(ask("best").error_message(), Not(HasSubstr("cannot be used"))) << "a newer best one took its place";
}

TEST_F(ServicesTest, WorkersAreToldWhetherAFileIsLostOrItsDiskIsNotThere) {
  const std::string sha = Sha256Hex("a checkpoint");
  const auto reason = [&] {
    std::string back;
    const absl::Status status = net::StatusFromGrpc(Fetch(sha, 0, &back));
    EXPECT_FALSE(absl::IsUnavailable(status)) << "workers would wait for it";
    return net::GetErrorInfo(status).reason;
  };
  EXPECT_EQ(reason(), "CONTENT_MISSING");
  EXPECT_TRUE(absl::IsNotFound(artifacts_->work()->CheckBlobs({sha})));
  std::filesystem::rename(dir_ + "/data/blobs", dir_ + "/unmounted");
  EXPECT_EQ(reason(), "STORE_UNREADABLE");
  EXPECT_TRUE(absl::IsUnavailable(artifacts_->work()->CheckBlobs({sha})));
  std::filesystem::rename(dir_ + "/unmounted", dir_ + "/data/blobs");
  ASSERT_TRUE(Upload("a checkpoint").ok());
  EXPECT_TRUE(artifacts_->work()->CheckBlobs({sha}).ok());
  EXPECT_EQ(reason(), "");
}

TEST_F(ServicesTest, UploadedAdapterIsCheckedAndDownloadedByContent) {
  model::AdapterConfig config;
  config.r = 2;
  config.lora_alpha = 4;
  config.target_modules = {"q_proj"};
  const std::string text = model::AdapterConfigText(config);
  std::vector<model::TensorInfo> infos;
  int64_t size = 0;
  for (const model::ExpectedTensor& t : model::AdapterTensors(ParsedTinyConfig(), 2, config.target_modules)) {
    infos.push_back({t.name, "F32", t.shape, 0, 0});
    size += 4 * t.shape[0] * t.shape[1];
  }
  const std::string weights = model::SafetensorsHeaderBytes(infos, {{"format", "pt"}}) + std::string(static_cast<size_t>(size), '\1');
  const auto create = [&](const std::string& c, const std::string& w, const std::string& weights_name, v1::ArtifactManifest* manifest) {
    EXPECT_TRUE(Upload(c).ok() && Upload(w).ok());
    v1::CreateAdapterRequest request;
    request.set_request_id(absl::StrCat("a", ++counter_));
    for (const auto& [name, bytes] : {std::make_pair(std::string("adapter_config.json"), c), std::make_pair(weights_name, w)}) {
      v1::FileRef* file = request.add_files();
      file->set_name(name);
      file->set_sha256(Sha256Hex(bytes));
      file->set_size_bytes(static_cast<int64_t>(bytes.size()));
    }
    grpc::ClientContext context;
    return v1::ArtifactService::NewStub(channel_)->CreateAdapter(&context, request, manifest);
  };
  v1::ArtifactManifest manifest;
  grpc::Status status = create(text, weights, "adapter_model.safetensors", &manifest);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(manifest.id().size(), 8u + 16u);
  const auto download = [&](const std::string& artifact, const std::string& sha) {
    grpc::ClientContext context;
    v1::DownloadRequest request;
    request.set_artifact_id(artifact);
    request.set_sha256(sha);
    auto reader = v1::ArtifactService::NewStub(channel_)->Download(&context, request);
    v1::FileChunk chunk;
    std::string bytes;
    while (reader->Read(&chunk)) bytes += chunk.data();
    const grpc::Status finished = reader->Finish();
    return finished.ok() ? bytes : absl::StrCat("code ", static_cast<int>(finished.error_code()));
  };
  EXPECT_EQ(download(manifest.id(), Sha256Hex(weights)), weights);
  ASSERT_TRUE(Upload("a secret").ok());
  EXPECT_EQ(download(manifest.id(), Sha256Hex("a secret")), "code 5");  // not a file of this artifact

  PutTinyModel(JoinPath(dir_, "root/tiny"));
  ASSERT_TRUE(Register("tiny", "tiny").ok());
  const auto model = controller_->Run([](JobStore& store) { return store.GetModel("tiny"); });
  v1::AdapterSpec spec;
  spec.set_r(2);
  spec.set_lora_alpha(4);
  spec.add_target_modules("q_proj");
  EXPECT_TRUE(artifacts_->CheckInitAdapter(manifest, *model, spec).ok());
  spec.set_r(4);
  EXPECT_THAT(std::string(artifacts_->CheckInitAdapter(manifest, *model, spec).message()), HasSubstr("set adapter.r to 2"));
  spec.set_r(2);
  v1::ModelRecord other = *model;
  json wide = TinyConfig();
  wide["hidden_size"] = 32;
  other.set_config(wide.dump());
  EXPECT_THAT(std::string(artifacts_->CheckInitAdapter(manifest, other, spec).message()), HasSubstr("another model"));

  EXPECT_THAT(create("{\"peft_type\": \"IA3\"}", weights, "adapter_model.safetensors", &manifest).error_message(), HasSubstr("peft_type"));
  EXPECT_THAT(create(text, weights, "adapter_model.bin", &manifest).error_message(), HasSubstr("pickle"));
  EXPECT_THAT(create(text, weights.substr(0, weights.size() - 1), "adapter_model.safetensors", &manifest).error_message(), HasSubstr("truncated"));
  EXPECT_THAT(create(text, weights.substr(0, weights.size() - 4) + std::string("\0\0\xc0\x7f", 4), "adapter_model.safetensors", &manifest).error_message(),
              HasSubstr("NaN"));
}

TEST_F(ServicesTest, PreparesTokensOnceAndShowsThem) {
  PutTinyModel(JoinPath(dir_, "root/tiny"));
  ASSERT_TRUE(Register("tiny", "tiny").ok());
  const std::string rows = "{\"prompt\": \"a b \", \"completion\": \"c d\"}\n{\"prompt\": \"e \", \"completion\": \"f\"}\n";
  ASSERT_TRUE(Upload(rows).ok());
  PrepareInput input;
  input.datasets.emplace_back();
  ASSERT_TRUE(CreateDataset("train.jsonl", rows, &input.datasets[0]).ok());
  input.model = *controller_->Run([](JobStore& store) { return store.GetModel("tiny"); });
  v1::DataSpec* data = input.spec.mutable_data();
  v1::DatasetSpec* spec = data->add_datasets();
  spec->set_path(input.datasets[0].id());
  spec->set_source("train.jsonl");
  spec->set_type("prompt_completion");
  (*spec->mutable_field_map())["prompt"] = "prompt";
  (*spec->mutable_field_map())["completion"] = "completion";
  data->set_chat_template("none");
  data->set_train_on_eos("turn");
  data->set_sequence_len(32);
  data->set_excess_length_strategy("truncate");
  const auto prepared = artifacts_->work()->Prepare(input, nullptr);
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  EXPECT_EQ(prepared->train().rows(), 2);
  EXPECT_EQ(prepared->train().lengths(0), 5u);  // a b c d </s>
  EXPECT_EQ(prepared->train().targets(0), 3u);
  EXPECT_EQ(prepared->train().supervised_tokens(), 5);
  EXPECT_FALSE(prepared->has_eval_tokens());
  EXPECT_TRUE(artifacts_->blobs().Find(prepared->train_tokens().sha256()));

  // The cache: without the program it still answers; another option misses.
  input.spec.set_seed(99);
  const auto again = artifacts_->work()->Prepare(input, [] { return true; });  // would be cancelled if it ran
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->SerializeAsString(), prepared->SerializeAsString());
  data->set_sequence_len(31);
  EXPECT_EQ(artifacts_->work()->Prepare(input, [] { return true; }).status().code(), absl::StatusCode::kCancelled);

  grpc::ClientContext context;
  v1::PreviewDatasetRequest preview;
  preview.set_base_model("tiny");
  *preview.mutable_data() = *data;
  preview.set_num_rows(1);
  v1::PreviewDatasetResponse shown;
  const grpc::Status status = v1::DatasetService::NewStub(channel_)->PreviewDataset(&context, preview, &shown);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(shown.rows_size(), 1);
  ASSERT_EQ(shown.rows(0).tokens_size(), 5);
  EXPECT_FALSE(shown.rows(0).tokens(1).supervised());
  EXPECT_TRUE(shown.rows(0).tokens(2).supervised());

  const std::string bad = "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n";
  ASSERT_TRUE(Upload(bad).ok());
  ASSERT_TRUE(CreateDataset("bad.jsonl", bad, &input.datasets[0]).ok());
  data->mutable_datasets(0)->set_source("bad.jsonl");
  const auto refused = artifacts_->work()->Prepare(input, nullptr);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("bad.jsonl: row 2"));
  EXPECT_EQ(net::GetErrorInfo(refused.status()).reason, "DATASET_INVALID");
  EXPECT_TRUE(ListDir(JoinPath(dir_, "data/tmp"))->empty());
}

}  // namespace
}  // namespace ppft::coordinator
