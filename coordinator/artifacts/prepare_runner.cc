#include "coordinator/artifacts/prepare_runner.h"

#include <google/protobuf/util/json_util.h>
#include <string.h>

#include <algorithm>
#include <cassert>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/data/token_file.h"
#include "common/net/status.h"
#include "coordinator/artifacts/child_process.h"
#include "coordinator/artifacts/tokenizer_files.h"
#include "nlohmann/json.hpp"

namespace ppft::coordinator {
namespace {

using nlohmann::json;

// Part of the cache key: grows when ppft-prepare would make other token files of the same input.
constexpr int kPrepareVersion = 1;
constexpr char kTrainFile[] = "train.safetensors";
constexpr char kEvalFile[] = "eval.safetensors";

std::string SnakeJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(message, &text, options);
  assert(status.ok());  // fails only for Any messages
  static_cast<void>(status);
  return text;
}

std::vector<v1::FileRef> FilesOf(const v1::ModelRecord& model) { return {model.files().begin(), model.files().end()}; }

absl::Status WithReason(absl::Status status, const std::string& reason) {
  net::SetErrorInfo(&status, {reason, {}});
  return status;
}

// Its one line of JSON; {"ok": false} becomes a status.
absl::StatusOr<json> RunPrepare(const std::vector<std::string>& arguments, const std::function<bool()>& cancelled) {
  PPFT_ASSIGN_OR_RETURN(const ChildResult result, RunChild(arguments, ChildLimits(), cancelled));
  const json answer = json::parse(result.output, nullptr, /*allow_exceptions=*/false);
  if (result.signal != 0 || result.status != 0 || !answer.is_object() || !answer.contains("ok") || !answer["ok"].is_boolean()) {
    const std::string how = result.signal != 0 ? absl::StrCat("was ended by signal ", result.signal, " (", strsignal(result.signal), ")")
                                               : absl::StrCat("exited with ", result.status);
    return absl::InternalError(absl::StrCat("ppft-prepare ", how, result.errors.empty() ? "" : absl::StrCat(": ", result.errors)));
  }
  if (answer["ok"].get<bool>()) return answer;
  const std::string code = answer.value("code", "INTERNAL");
  const std::string message = answer.value("message", "ppft-prepare gave no reason");
  if (code == "DISK_FULL") return WithReason(absl::ResourceExhaustedError(message), code);
  if (code == "INTERNAL") return absl::InternalError(message);
  return WithReason(absl::InvalidArgumentError(message), code);
}

absl::StatusOr<v1::TokenStatistics> StatisticsOf(const std::string& path) {
  PPFT_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  PPFT_ASSIGN_OR_RETURN(const data::TokenFile tokens, data::ParseTokenFile(file.bytes()));
  v1::TokenStatistics out;
  out.set_rows(tokens.rows.num_rows());
  out.set_tokens(tokens.rows.num_tokens());
  int64_t targets = 0;
  for (int64_t row = 0; row < tokens.rows.num_rows(); ++row) {
    const int64_t length = tokens.rows.length(row);
    out.add_lengths(static_cast<uint32_t>(length));
    out.add_targets(static_cast<uint32_t>(tokens.rows.targets(row)));
    targets += tokens.rows.targets(row);
    if (length > out.longest_row()) out.set_longest_row(static_cast<int32_t>(length));
  }
  out.set_supervised_tokens(targets);
  return out;
}

// A temporary folder for one call.
class Workspace {
 public:
  explicit Workspace(std::string path) : path_(std::move(path)) {}
  ~Workspace() {
    const absl::Status status = RemoveAll(path_);
    if (!status.ok()) LogWarning("a temporary folder stays until the next start: ", std::string(status.message()));
  }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

json DatasetsJson(const BlobStore& blobs, const google::protobuf::RepeatedPtrField<v1::DatasetSpec>& specs, const std::vector<v1::Dataset>& datasets) {
  json out = json::array();
  for (int i = 0; i < specs.size(); ++i) {
    json field_map = json::object();
    for (const auto& [role, key] : specs[i].field_map()) field_map[role] = key;
    const std::string source = !specs[i].source().empty() ? specs[i].source() : !datasets[i].name().empty() ? datasets[i].name() : specs[i].path();
    out.push_back({{"file", blobs.PathOf(datasets[i].sha256())}, {"source", source}, {"type", specs[i].type()}, {"field_map", field_map}});
  }
  return out;
}

absl::Status CheckCounts(const v1::DataSpec& data, const std::vector<v1::Dataset>& datasets, const std::vector<v1::Dataset>& test_datasets) {
  if (static_cast<size_t>(data.datasets_size()) != datasets.size() || static_cast<size_t>(data.test_datasets_size()) != test_datasets.size()) {
    return absl::InternalError("a dataset of the spec was not looked up");
  }
  return absl::OkStatus();
}

}  // namespace

std::string PrepareRunner::CacheKey(const PrepareInput& input) {
  v1::DataSpec data = input.spec.data();
  const auto strip = [](google::protobuf::RepeatedPtrField<v1::DatasetSpec>& specs) {
    for (v1::DatasetSpec& spec : specs) {
      spec.clear_path();
      spec.clear_source();
    }
  };
  strip(*data.mutable_datasets());
  strip(*data.mutable_test_datasets());
  // These decide the order of rows in training, not the tokens.
  data.clear_shuffle();
  data.clear_sample_packing();
  json key = {{"version", kPrepareVersion},
              {"data", json::parse(SnakeJson(data))},
              {"tokenizer", TokenizerSha256(FilesOf(input.model))},
              {"vocab_size", input.model.model().vocab_size()},
              {"max_position_embeddings", input.model.model().max_position_embeddings()},
              {"seed", data.val_set_size() > 0 ? input.spec.seed() : 0},
              {"datasets", json::array()},
              {"test_datasets", json::array()}};
  for (const v1::Dataset& dataset : input.datasets) key["datasets"].push_back(dataset.sha256());
  for (const v1::Dataset& dataset : input.test_datasets) key["test_datasets"].push_back(dataset.sha256());
  return Sha256Hex(key.dump());  // keys are sorted: the same input gives the same text
}

absl::StatusOr<std::string> PrepareRunner::RequestJson(const v1::ModelRecord& model, const v1::DataSpec& data, int64_t seed,
                                                       const std::vector<v1::Dataset>& datasets, const std::vector<v1::Dataset>& test_datasets,
                                                       const std::string& folder) {
  PPFT_RETURN_IF_ERROR(CheckCounts(data, datasets, test_datasets));
  PPFT_ASSIGN_OR_RETURN(const std::string tokenizer_dir, TokenizerDir(*blobs_, FilesOf(model)));
  json request = {{"tokenizer_dir", tokenizer_dir},
                  {"vocab_size", model.model().vocab_size()},
                  {"max_position_embeddings", model.model().max_position_embeddings()},
                  {"data", json::parse(SnakeJson(data))},
                  {"datasets", DatasetsJson(*blobs_, data.datasets(), datasets)},
                  {"seed", seed},
                  {"output_train", JoinPath(folder, kTrainFile)},
                  {"output_eval", JoinPath(folder, kEvalFile)}};
  if (data.test_datasets_size() > 0) request["test_datasets"] = DatasetsJson(*blobs_, data.test_datasets(), test_datasets);
  const std::string path = JoinPath(folder, "request.json");
  PPFT_RETURN_IF_ERROR(WriteFileAtomic(path, request.dump()));
  return path;
}

absl::StatusOr<v1::PreparedData> PrepareRunner::Cached(const std::string& key) {
  PPFT_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(JoinPath(blobs_->data_dir(), absl::StrCat("prepared/", key))));
  v1::PreparedData out;
  // A file of an older version or a deleted blob is a miss.
  if (!out.ParseFromString(bytes)) return absl::NotFoundError("not readable");
  for (const v1::FileRef* file : {&out.train_tokens(), &out.eval_tokens()}) {
    if (!file->sha256().empty() && (!blobs_->Touch(file->sha256()) || blobs_->Find(file->sha256()) != std::optional<int64_t>(file->size_bytes())))
      return absl::NotFoundError("its token file is gone");
  }
  if (out.train_tokens().sha256().empty()) return absl::NotFoundError("empty");
  return out;
}

absl::StatusOr<v1::PreparedData> PrepareRunner::Collect(const std::string& folder) {
  v1::PreparedData out;
  const std::string train = JoinPath(folder, kTrainFile);
  PPFT_ASSIGN_OR_RETURN(*out.mutable_train(), StatisticsOf(train));
  PPFT_ASSIGN_OR_RETURN(*out.mutable_train_tokens(), blobs_->AddFile(train, kTrainFile));
  const std::string eval = JoinPath(folder, kEvalFile);
  if (!PathExists(eval)) return out;
  PPFT_ASSIGN_OR_RETURN(*out.mutable_eval(), StatisticsOf(eval));
  PPFT_ASSIGN_OR_RETURN(*out.mutable_eval_tokens(), blobs_->AddFile(eval, kEvalFile));
  return out;
}

absl::StatusOr<v1::PreparedData> PrepareRunner::Prepare(const PrepareInput& input, const std::function<bool()>& cancelled) {
  const std::string key = CacheKey(input);
  absl::StatusOr<v1::PreparedData> cached = Cached(key);
  if (cached.ok()) return cached;
  PPFT_ASSIGN_OR_RETURN(std::string folder, blobs_->MakeTemporaryDir("prepare"));
  const Workspace workspace(std::move(folder));
  PPFT_ASSIGN_OR_RETURN(const std::string request,
                        RequestJson(input.model, input.spec.data(), input.spec.seed(), input.datasets, input.test_datasets, workspace.path()));
  PPFT_RETURN_IF_ERROR(RunPrepare({binary_, "--request", request}, cancelled).status());
  PPFT_ASSIGN_OR_RETURN(v1::PreparedData out, Collect(workspace.path()));
  if (out.train().supervised_tokens() == 0) {
    return WithReason(absl::InvalidArgumentError("the training rows have no supervised token: check the answers' field and train_on_inputs"),
                      "DATASET_INVALID");
  }
  PPFT_RETURN_IF_ERROR(MakeDirs(JoinPath(blobs_->data_dir(), "prepared")));
  PPFT_RETURN_IF_ERROR(WriteFileAtomic(JoinPath(blobs_->data_dir(), absl::StrCat("prepared/", key)), out.SerializeAsString()));
  return out;
}

absl::StatusOr<v1::PreviewDatasetResponse> PrepareRunner::Preview(const v1::ModelRecord& model, const v1::DataSpec& data,
                                                                  const std::vector<v1::Dataset>& datasets, int rows, const std::function<bool()>& cancelled) {
  PPFT_ASSIGN_OR_RETURN(std::string folder, blobs_->MakeTemporaryDir("preview"));
  const Workspace workspace(std::move(folder));
  v1::DataSpec shown = data;
  shown.clear_test_datasets();
  shown.set_val_set_size(0);
  PPFT_ASSIGN_OR_RETURN(const std::string request, RequestJson(model, shown, 0, datasets, {}, workspace.path()));
  PPFT_ASSIGN_OR_RETURN(const json answer, RunPrepare({binary_, "--request", request, "--preview", absl::StrCat(rows)}, cancelled));
  v1::PreviewDatasetResponse out;
  for (const json& row : answer.value("rows", json::array())) {
    v1::PreviewDatasetResponse::Row* to = out.add_rows();
    to->set_row(row.value("row", int64_t{0}));
    to->set_truncated(row.value("truncated", false));
    for (const json& token : row.value("tokens", json::array())) {
      v1::PreviewDatasetResponse::Token* one = to->add_tokens();
      one->set_id(token.value("id", uint32_t{0}));
      one->set_piece(token.value("piece", ""));
      one->set_supervised(token.value("supervised", false));
      std::string text = token.value("text", "");
      if (token.contains("text_base64") && !absl::Base64Unescape(token.value("text_base64", ""), &text))
        return absl::InternalError("ppft-prepare wrote bad base64");
      one->set_text(text);
    }
  }
  return out;
}

absl::Status PrepareRunner::CheckTokenizer(const std::string& tokenizer_dir, int64_t vocab_size, const std::function<bool()>& cancelled) {
  return RunPrepare({binary_, "--check-tokenizer", tokenizer_dir, "--vocab_size", absl::StrCat(vocab_size)}, cancelled).status();
}

}  // namespace ppft::coordinator
