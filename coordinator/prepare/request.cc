#include "coordinator/prepare/request.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::coordinator::prepare {
namespace {

using Json = nlohmann::json;

constexpr char kCodeUrl[] = "ppft.prepare.code";

absl::Status BadSpec(absl::string_view field, absl::string_view what) { return Refuse("SPEC_INVALID", absl::StrCat(field, ": ", what)); }

// One object of the request: typed reads by key, and at the end a complaint about the keys that nobody knows.
class Fields {
 public:
  Fields(const Json& object, std::string name) : object_(object), name_(std::move(name)) {}

  const Json* Find(const char* key) {
    known_.insert(key);
    const auto entry = object_.find(key);
    return entry == object_.end() || entry->is_null() ? nullptr : &*entry;
  }
  std::string NameOf(const char* key) const { return name_.empty() ? key : absl::StrCat(name_, ".", key); }

  absl::Status Text(const char* key, std::string* out) {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_string()) return BadSpec(NameOf(key), "expected a string");
    *out = value->get<std::string>();
    return absl::OkStatus();
  }
  absl::Status Flag(const char* key, bool* out) {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_boolean()) return BadSpec(NameOf(key), "expected true or false");
    *out = value->get<bool>();
    return absl::OkStatus();
  }
  absl::Status Integer(const char* key, int64_t low, int64_t high, int64_t* out) {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    const bool parsed =
        value->is_number_integer() ? (*out = value->get<int64_t>(), true) : value->is_string() && absl::SimpleAtoi(value->get_ref<const std::string&>(), out);
    if (!parsed || *out < low || *out > high) return BadSpec(NameOf(key), absl::StrCat("expected a whole number from ", low, " to ", high));
    return absl::OkStatus();
  }
  absl::Status Ratio(const char* key, double* out) {
    const Json* value = Find(key);
    if (value == nullptr) return absl::OkStatus();
    if (!value->is_number()) return BadSpec(NameOf(key), "expected a number");
    *out = value->get<double>();
    if (!(*out >= 0 && *out < 1)) return BadSpec(NameOf(key), "expected a number from 0 to below 1");
    return absl::OkStatus();
  }
  absl::Status NoOthers() const {
    for (const auto& [key, value] : object_.items()) {
      if (known_.count(key) == 0) return BadSpec(name_.empty() ? key : absl::StrCat(name_, ".", key), "unknown key");
    }
    return absl::OkStatus();
  }

 private:
  const Json& object_;
  std::string name_;
  std::set<std::string> known_;
};

absl::Status ParseData(const Json& json, DataOptions* data) {
  Fields fields(json, "data");
  std::string eos = "turn";
  PPFT_RETURN_IF_ERROR(fields.Text("instruction_prefix", &data->instruction_prefix));
  PPFT_RETURN_IF_ERROR(fields.Text("response_prefix", &data->response_prefix));
  PPFT_RETURN_IF_ERROR(fields.Flag("train_on_inputs", &data->train_on_inputs));
  PPFT_RETURN_IF_ERROR(fields.Text("train_on_eos", &eos));
  PPFT_RETURN_IF_ERROR(fields.Integer("sequence_len", 8, int64_t{1} << 24, &data->sequence_len));
  PPFT_RETURN_IF_ERROR(fields.Text("excess_length_strategy", &data->excess_length_strategy));
  PPFT_RETURN_IF_ERROR(fields.Ratio("val_set_size", &data->val_set_size));
  for (const char* unread : {"datasets", "test_datasets", "chat_template", "roles_to_train", "sample_packing", "shuffle"}) fields.Find(unread);
  PPFT_RETURN_IF_ERROR(fields.NoOthers());

  if (data->sequence_len == 0) return BadSpec("data.sequence_len", "is missing");
  if (eos.empty()) eos = "turn";
  if (data->excess_length_strategy.empty()) data->excess_length_strategy = "truncate";
  if (eos != "all" && eos != "turn" && eos != "last" && eos != "none") return BadSpec("data.train_on_eos", "expected all, turn, last or none");
  data->train_on_eos = eos != "none";
  const std::string& strategy = data->excess_length_strategy;
  if (strategy != "drop" && strategy != "truncate" && strategy != "raise") {
    return BadSpec("data.excess_length_strategy", "expected drop, truncate or raise");
  }
  return absl::OkStatus();
}

absl::Status ParseDatasets(const Json& list, const std::string& name, std::vector<DatasetRequest>* out) {
  if (!list.is_array()) return BadSpec(name, "expected a list");
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string item = absl::StrCat(name, "[", i, "]");
    if (!list[i].is_object()) return BadSpec(item, "expected an object");
    Fields fields(list[i], item);
    DatasetRequest dataset;
    PPFT_RETURN_IF_ERROR(fields.Text("file", &dataset.file));
    PPFT_RETURN_IF_ERROR(fields.Text("source", &dataset.source));
    PPFT_RETURN_IF_ERROR(fields.Text("type", &dataset.type));
    const Json* map = fields.Find("field_map");
    if (map != nullptr) {
      if (!map->is_object()) return BadSpec(fields.NameOf("field_map"), "expected an object of role: key");
      for (const auto& [role, key] : map->items()) {
        if (!key.is_string()) return BadSpec(absl::StrCat(fields.NameOf("field_map"), ".", role), "expected a string");
        dataset.field_map[role] = key.get<std::string>();
      }
    }
    fields.Find("path");
    PPFT_RETURN_IF_ERROR(fields.NoOthers());
    if (dataset.file.empty()) return BadSpec(fields.NameOf("file"), "is missing");
    if (dataset.source.empty()) dataset.source = dataset.file;
    out->push_back(std::move(dataset));
  }
  return absl::OkStatus();
}

absl::Status CheckTogether(const Request& request, bool writes) {
  if (request.tokenizer_dir.empty()) return BadSpec("tokenizer_dir", "is missing");
  if (request.vocab_size == 0) return BadSpec("vocab_size", "is missing");
  if (request.datasets.empty()) return BadSpec("data.datasets", "at least one dataset is needed");
  if (request.max_position_embeddings > 0 && request.data.sequence_len > request.max_position_embeddings) {
    return BadSpec("data.sequence_len", absl::StrCat("(", request.data.sequence_len, ") must be at most the model's max_position_embeddings (",
                                                     request.max_position_embeddings, ")"));
  }
  if (request.data.val_set_size > 0 && !request.test_datasets.empty()) {
    return BadSpec("data.val_set_size", "give either val_set_size or test_datasets, not both");
  }
  if (!writes) return absl::OkStatus();
  if (request.output_train.empty()) return BadSpec("output_train", "is missing");
  if ((request.data.val_set_size > 0 || !request.test_datasets.empty()) && request.output_eval.empty()) return BadSpec("output_eval", "is missing");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Request> ParseRequest(absl::string_view text, bool writes) {
  const Json json = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Refuse("SPEC_INVALID", "the request is not a JSON object");
  Fields fields(json, "");
  Request request;
  int64_t seed = 42;
  int64_t threads = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 4);
  PPFT_RETURN_IF_ERROR(fields.Text("tokenizer_dir", &request.tokenizer_dir));
  PPFT_RETURN_IF_ERROR(fields.Integer("vocab_size", 1, int64_t{1} << 31, &request.vocab_size));
  PPFT_RETURN_IF_ERROR(fields.Integer("max_position_embeddings", 0, int64_t{1} << 31, &request.max_position_embeddings));
  PPFT_RETURN_IF_ERROR(fields.Integer("seed", 0, INT64_MAX, &seed));
  PPFT_RETURN_IF_ERROR(fields.Integer("threads", 1, 256, &threads));
  PPFT_RETURN_IF_ERROR(fields.Text("output_train", &request.output_train));
  PPFT_RETURN_IF_ERROR(fields.Text("output_eval", &request.output_eval));
  request.seed = static_cast<uint64_t>(seed);
  request.threads = static_cast<int>(threads);
  const Json* data = fields.Find("data");
  if (data == nullptr || !data->is_object()) return BadSpec("data", "expected an object");
  PPFT_RETURN_IF_ERROR(ParseData(*data, &request.data));
  request.data_json = data->dump();
  if (const Json* datasets = fields.Find("datasets")) PPFT_RETURN_IF_ERROR(ParseDatasets(*datasets, "datasets", &request.datasets));
  if (const Json* datasets = fields.Find("test_datasets")) PPFT_RETURN_IF_ERROR(ParseDatasets(*datasets, "test_datasets", &request.test_datasets));
  PPFT_RETURN_IF_ERROR(fields.NoOthers());
  PPFT_RETURN_IF_ERROR(CheckTogether(request, writes));
  return request;
}

absl::Status Refuse(absl::string_view code, absl::string_view message) {
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kCodeUrl, absl::Cord(code));
  return status;
}

std::string CodeOf(const absl::Status& status) {
  if (const auto code = status.GetPayload(kCodeUrl); code.has_value()) return std::string(*code);
  if (absl::IsInvalidArgument(status)) return "DATASET_INVALID";
  return absl::IsResourceExhausted(status) ? "DISK_FULL" : "INTERNAL";
}

}  // namespace ppft::coordinator::prepare
