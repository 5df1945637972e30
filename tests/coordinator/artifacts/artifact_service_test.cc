// Checkpoints and artifacts as clients fetch them, and adapters that they upload.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/peft.h"
#include "tests/coordinator/artifacts/services_test.h"
#include "tests/coordinator/artifacts/tiny_model.h"

namespace ppft::coordinator {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

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
  {
    std::lock_guard<std::mutex> lock(moved_mutex_);
    EXPECT_EQ(moved_["upload"], static_cast<int64_t>(text.size() + weights.size()));
    EXPECT_EQ(moved_["download"], static_cast<int64_t>(weights.size()));
  }
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

}  // namespace
}  // namespace ppft::coordinator
