// Registration, with everything that must be refused, and the tensors that workers fetch.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/files.h"
#include "common/model/inventory.h"
#include "common/net/status.h"
#include "tests/coordinator/artifacts/services_test.h"
#include "tests/coordinator/artifacts/tiny_model.h"

namespace ppft::coordinator {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

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

}  // namespace
}  // namespace ppft::coordinator
