// Uploads, datasets and what is prepared from them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/net/status.h"
#include "tests/coordinator/artifacts/services_test.h"
#include "tests/coordinator/artifacts/tiny_model.h"

namespace ppft::coordinator {
namespace {

using ::testing::HasSubstr;

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
