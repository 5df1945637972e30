#include "coordinator/artifacts/assembly.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/model/config.h"
#include "common/model/inventory.h"
#include "common/model/peft.h"
#include "common/net/status.h"
#include "coordinator/artifacts/tensor_files.h"
#include "coordinator/artifacts/tokenizer_files.h"
#include "nlohmann/json.hpp"

namespace ppft::coordinator {
namespace {

using nlohmann::ordered_json;

constexpr char kAdapterFile[] = "adapter_model.safetensors";
constexpr char kAdapterConfigFile[] = "adapter_config.json";
constexpr int64_t kMaxAdapterConfigBytes = 1 << 20;

using TensorFiles = std::vector<std::unique_ptr<TensorFile>>;

absl::StatusOr<TensorFiles> OpenAll(const BlobStore& blobs, const std::vector<v1::FileRef>& refs) {
  TensorFiles files;
  for (const v1::FileRef& ref : refs) {
    PPFT_ASSIGN_OR_RETURN(auto file, TensorFile::Open(blobs, ref));
    files.push_back(std::move(file));
  }
  return files;
}

// Every tensor of the files once. A second copy must be equal (both ends of a pipeline hold a tied embedding).
absl::StatusOr<std::map<std::string, TensorSource>> Gather(const TensorFiles& files) {
  std::map<std::string, TensorSource> out;
  for (const auto& file : files) {
    for (const model::TensorInfo& info : file->header.tensors) {
      const TensorSource source{file.get(), &info};
      const auto [first, is_new] = out.emplace(info.name, source);
      if (is_new) continue;
      PPFT_ASSIGN_OR_RETURN(const bool same, SameTensor(first->second, source));
      if (!same) return absl::InternalError(absl::StrCat("two ranks wrote different values of ", info.name));
    }
  }
  return out;
}

// The expected tensors in their order; each must be there with its shape and dtype ("" = any) and finite.
absl::StatusOr<std::vector<TensorSource>> Pick(const std::map<std::string, TensorSource>& present, const std::vector<model::ExpectedTensor>& expected,
                                               absl::string_view dtype) {
  std::vector<TensorSource> out;
  for (const model::ExpectedTensor& want : expected) {
    const auto found = present.find(want.name);
    if (found == present.end()) return absl::InternalError(absl::StrCat("no rank wrote ", want.name));
    const model::TensorInfo& info = *found->second.info;
    if (info.shape != want.shape || (!dtype.empty() && info.dtype != dtype)) {
      return absl::InternalError(
          absl::StrCat(want.name, " was written as ", info.dtype, " ", model::ShapeText(info.shape), ", expected ", dtype, " ", model::ShapeText(want.shape)));
    }
    PPFT_ASSIGN_OR_RETURN(const bool bad, HasNonFinite(found->second));
    if (bad) {
      absl::Status status =
          absl::InvalidArgumentError(absl::StrCat(want.name, " holds NaN or infinite numbers: the training diverged; lower training.learning_rate"));
      net::SetErrorInfo(&status, {"NUMERIC_DIVERGENCE", {}});
      return status;
    }
    out.push_back(found->second);
  }
  return out;
}

std::vector<std::string> Targets(const v1::AdapterSpec& spec) { return {spec.target_modules().begin(), spec.target_modules().end()}; }

absl::StatusOr<model::ModelConfig> ConfigOf(const v1::ModelRecord& model) {
  return model::ParseModelConfig(model.config(), JoinPath(model.model().path(), "config.json"));
}

absl::Status AddText(BlobStore& blobs, absl::string_view text, absl::string_view name, v1::ArtifactManifest* manifest) {
  PPFT_ASSIGN_OR_RETURN(*manifest->add_files(), blobs.AddBytes(text, name));
  return absl::OkStatus();
}

// Tokenizer, model card and trainer_state.json.
absl::Status AddCommonFiles(BlobStore& blobs, const v1::ModelRecord& model, const TrainingSummary& summary, v1::ArtifactManifest* manifest) {
  for (const v1::FileRef& file : model.files()) {
    if (IsTokenizerFile(file.name())) *manifest->add_files() = file;
  }
  PPFT_RETURN_IF_ERROR(AddText(blobs, ModelCardText(summary, model.model().name(), manifest->type()), "README.md", manifest));
  return AddText(blobs, TrainerStateText(summary), "trainer_state.json", manifest);
}

absl::Status FillAdapter(BlobStore& blobs, const std::vector<v1::FileRef>& rank_files, const v1::ModelRecord& model, const TrainingSummary& summary,
                         v1::ArtifactManifest* manifest) {
  PPFT_ASSIGN_OR_RETURN(const model::ModelConfig config, ConfigOf(model));
  PPFT_ASSIGN_OR_RETURN(const TensorFiles files, OpenAll(blobs, rank_files));
  PPFT_ASSIGN_OR_RETURN(const auto present, Gather(files));
  const v1::AdapterSpec& spec = summary.spec.adapter();
  PPFT_ASSIGN_OR_RETURN(const std::vector<TensorSource> tensors, Pick(present, model::AdapterTensors(config, spec.r(), Targets(spec)), "F32"));
  PPFT_ASSIGN_OR_RETURN(*manifest->add_files(), JoinTensors(blobs, tensors, kAdapterFile));
  model::AdapterConfig adapter;
  adapter.r = spec.r();
  adapter.lora_alpha = spec.lora_alpha();
  adapter.lora_dropout = spec.lora_dropout();
  adapter.target_modules = Targets(spec);
  adapter.use_rslora = spec.use_rslora();
  adapter.base_model = model.model().name();
  PPFT_RETURN_IF_ERROR(AddText(blobs, model::AdapterConfigText(adapter), kAdapterConfigFile, manifest));
  return AddCommonFiles(blobs, model, summary, manifest);
}

std::string TorchDtype(absl::string_view dtype) { return dtype == "BF16" ? "bfloat16" : dtype == "F16" ? "float16" : "float32"; }

// config.json with the type of the merged weights, under the keys it already uses.
absl::StatusOr<std::string> MergedConfigText(const std::string& config, absl::string_view dtype) {
  ordered_json object = ordered_json::parse(config, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return absl::InternalError("the stored config.json is not an object");
  const bool has_new_key = object.contains("dtype");
  if (has_new_key) object["dtype"] = TorchDtype(dtype);
  if (!has_new_key || object.contains("torch_dtype")) object["torch_dtype"] = TorchDtype(dtype);
  return object.dump(2) + "\n";
}

// The ranks' files as shards. A file goes in as it is; one that repeats a tensor, or lacks the metadata that transformers asks for, is written anew.
absl::Status AddShards(BlobStore& blobs, const TensorFiles& files, const std::vector<TensorSource>& wanted, v1::ArtifactManifest* manifest) {
  std::set<const model::TensorInfo*> keep;
  int64_t total_bytes = 0;
  for (const TensorSource& tensor : wanted) {
    keep.insert(tensor.info);
    total_bytes += tensor.info->size_bytes;
  }
  std::vector<std::pair<v1::FileRef, std::vector<std::string>>> shards;  // with their tensors' names
  for (const auto& file : files) {
    std::vector<TensorSource> tensors;
    std::vector<std::string> names;
    for (const model::TensorInfo& info : file->header.tensors) {
      if (keep.count(&info) == 0) continue;
      tensors.push_back({file.get(), &info});
      names.push_back(info.name);
    }
    if (tensors.empty()) continue;
    const auto format = file->header.metadata.find("format");
    const bool as_it_is = tensors.size() == file->header.tensors.size() && format != file->header.metadata.end() && format->second == "pt";
    v1::FileRef ref = file->ref;
    if (!as_it_is) {
      PPFT_ASSIGN_OR_RETURN(ref, JoinTensors(blobs, tensors, "shard.safetensors"));
    }
    shards.emplace_back(std::move(ref), std::move(names));
  }
  std::map<std::string, std::string> file_of_tensor;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1 ? "model.safetensors" : absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, shards.size());
    shards[i].first.set_name(name);
    *manifest->add_files() = shards[i].first;
    for (const std::string& tensor : shards[i].second) file_of_tensor[tensor] = name;
  }
  if (shards.size() == 1) return absl::OkStatus();
  return AddText(blobs, model::SafetensorsIndexText(file_of_tensor, total_bytes), "model.safetensors.index.json", manifest);
}

absl::Status FillMerged(BlobStore& blobs, const std::vector<v1::FileRef>& rank_files, const v1::ModelRecord& model, const TrainingSummary& summary,
                        v1::ArtifactManifest* manifest) {
  PPFT_ASSIGN_OR_RETURN(const model::ModelConfig config, ConfigOf(model));
  PPFT_ASSIGN_OR_RETURN(const TensorFiles files, OpenAll(blobs, rank_files));
  PPFT_ASSIGN_OR_RETURN(const auto present, Gather(files));
  if (present.empty()) return absl::InternalError("no rank wrote merged weights");
  const std::string dtype = present.begin()->second.info->dtype;
  PPFT_ASSIGN_OR_RETURN(const std::vector<TensorSource> wanted, Pick(present, model::ExpectedTensors(config), dtype));
  PPFT_RETURN_IF_ERROR(AddShards(blobs, files, wanted, manifest));
  PPFT_ASSIGN_OR_RETURN(const std::string config_text, MergedConfigText(model.config(), dtype));
  PPFT_RETURN_IF_ERROR(AddText(blobs, config_text, "config.json", manifest));
  for (const v1::FileRef& file : model.files()) {
    if (file.name() == "generation_config.json") *manifest->add_files() = file;
  }
  return AddCommonFiles(blobs, model, summary, manifest);
}

TrainingSummary SummaryOf(const v1::JobSpec& spec, const v1::JobStatus& status, int64_t step, const std::vector<v1::MetricRow>& rows) {
  TrainingSummary summary;
  summary.spec = spec;
  summary.step = step;
  summary.max_steps = status.total_steps();
  for (const v1::MetricRow& row : rows) {
    if (row.step() > step) continue;
    summary.rows.push_back(row);
    summary.epoch = row.epoch();
  }
  if (status.has_best_metric() && status.best_step() <= step) {
    summary.best_metric = status.best_metric();
    summary.best_step = status.best_step();
  }
  summary.weights_step = step;
  return summary;
}

}  // namespace

absl::StatusOr<std::vector<v1::ArtifactManifest>> AssembleArtifacts(BlobStore& blobs, const AssembleInput& input) {
  if (input.exports.empty()) return absl::InternalError("no rank has exported");
  TrainingSummary summary = SummaryOf(input.spec, input.status, input.status.step(), input.metrics);
  summary.weights_step = input.exports[0].step();
  if (input.status.epoch() > 0) summary.epoch = input.status.epoch();
  std::vector<v1::FileRef> adapter_files, merged_files;
  for (const v1::ExportWritten& exported : input.exports) {
    if (exported.step() != summary.weights_step)
      return absl::InternalError(absl::StrCat("the ranks exported different steps: ", summary.weights_step, " and ", exported.step()));
    for (const v1::LocalFile& file : exported.adapter_files()) adapter_files.push_back(file.content());
    for (const v1::LocalFile& file : exported.merged_files()) merged_files.push_back(file.content());
  }
  std::vector<v1::ArtifactManifest> manifests;
  for (const std::string& format : input.spec.output().formats()) {
    v1::ArtifactManifest manifest;
    manifest.set_id(input.job_id);
    manifest.set_job_id(input.job_id);
    manifest.set_type(format);
    manifest.set_step(summary.weights_step);
    PPFT_RETURN_IF_ERROR(format == "merged" ? FillMerged(blobs, merged_files, input.model, summary, &manifest)
                                            : FillAdapter(blobs, adapter_files, input.model, summary, &manifest));
    for (const v1::ExportWritten& exported : input.exports) {
      for (const v1::Verification& verification : exported.verifications()) {
        if (verification.type() == format) *manifest.add_verifications() = verification;
      }
    }
    *manifest.mutable_create_time() = google::protobuf::util::TimeUtil::GetCurrentTime();
    manifests.push_back(std::move(manifest));
  }
  return manifests;
}

absl::StatusOr<v1::ArtifactManifest> AssembleCheckpointAdapter(BlobStore& blobs, const v1::Job& job, const v1::ModelRecord& model,
                                                               const v1::CheckpointManifest& checkpoint, const std::vector<v1::MetricRow>& rows) {
  const int64_t step = checkpoint.state().step();
  v1::ArtifactManifest manifest;
  manifest.set_id(absl::StrCat(job.id(), "@step-", step));
  manifest.set_job_id(job.id());
  manifest.set_type("adapter");
  manifest.set_step(step);
  TrainingSummary summary = SummaryOf(job.spec(), job.status(), step, rows);
  if (checkpoint.state().has_best_metric()) {
    summary.best_metric = checkpoint.state().best_metric();
    summary.best_step = checkpoint.state().best_step();
  }
  PPFT_RETURN_IF_ERROR(FillAdapter(blobs, {checkpoint.files().begin(), checkpoint.files().end()}, model, summary, &manifest));
  *manifest.mutable_create_time() = google::protobuf::util::TimeUtil::GetCurrentTime();
  return manifest;
}

absl::StatusOr<v1::ArtifactManifest> MakeUploadedAdapter(BlobStore& blobs, const std::vector<v1::FileRef>& files) {
  const v1::FileRef *config = nullptr, *weights = nullptr;
  bool has_pickle = false;
  for (const v1::FileRef& file : files) {
    if (file.name() == kAdapterConfigFile) config = &file;
    if (file.name() == kAdapterFile) weights = &file;
    has_pickle = has_pickle || file.name() == "adapter_model.bin";
  }
  if (config == nullptr)
    return absl::InvalidArgumentError(absl::StrCat("the adapter has no ", kAdapterConfigFile, "; give the folder that PEFT's save_pretrained wrote"));
  if (weights == nullptr && has_pickle) {
    return absl::InvalidArgumentError(
        "adapter_model.bin: pickle files can run code and are never opened; save the adapter with PEFT as adapter_model.safetensors");
  }
  if (weights == nullptr) return absl::InvalidArgumentError(absl::StrCat("the adapter has no ", kAdapterFile));
  for (const v1::FileRef* file : {config, weights}) {
    blobs.Touch(file->sha256());
    const auto size = blobs.Find(file->sha256());
    if (!size) return absl::FailedPreconditionError(absl::StrCat(file->name(), ": its content ", file->sha256(), " has not been uploaded"));
    if (*size != file->size_bytes())
      return absl::InvalidArgumentError(absl::StrCat(file->name(), ": size_bytes is ", file->size_bytes(), ", the upload has ", *size));
  }
  PPFT_ASSIGN_OR_RETURN(const std::string text, blobs.Read(config->sha256(), kMaxAdapterConfigBytes));
  PPFT_RETURN_IF_ERROR(model::ParseAdapterConfig(text, kAdapterConfigFile).status());
  PPFT_ASSIGN_OR_RETURN(const auto file, TensorFile::Open(blobs, *weights));
  for (const model::TensorInfo& info : file->header.tensors) {
    PPFT_ASSIGN_OR_RETURN(const bool bad, HasNonFinite({file.get(), &info}));
    if (bad) return absl::InvalidArgumentError(absl::StrCat(kAdapterFile, ": the tensor ", info.name, " holds NaN or infinite numbers; take another copy"));
  }
  v1::ArtifactManifest manifest;
  manifest.set_id(absl::StrCat("adapter-", Sha256Hex(absl::StrCat(config->sha256(), "\n", weights->sha256(), "\n")).substr(0, 16)));
  manifest.set_type("adapter");
  *manifest.add_files() = *config;
  *manifest.add_files() = *weights;
  *manifest.mutable_create_time() = google::protobuf::util::TimeUtil::GetCurrentTime();
  return manifest;
}

absl::Status CheckInitAdapter(const BlobStore& blobs, const v1::ArtifactManifest& adapter, const v1::ModelRecord& model, const v1::AdapterSpec& spec) {
  const v1::FileRef *config_file = nullptr, *weights = nullptr;
  for (const v1::FileRef& file : adapter.files()) {
    if (file.name() == kAdapterConfigFile) config_file = &file;
    if (file.name() == kAdapterFile) weights = &file;
  }
  if (config_file == nullptr || weights == nullptr) return absl::InvalidArgumentError(absl::StrCat(adapter.id(), " is no adapter"));
  PPFT_ASSIGN_OR_RETURN(const std::string text, blobs.Read(config_file->sha256(), kMaxAdapterConfigBytes));
  PPFT_ASSIGN_OR_RETURN(const model::AdapterConfig config, model::ParseAdapterConfig(text, kAdapterConfigFile));
  if (config.r != spec.r()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the adapter ", adapter.id(), " has r = ", config.r, ", but adapter.r is ", spec.r(), "; set adapter.r to ", config.r));
  }
  std::vector<std::string> targets = Targets(spec);
  if (config.target_modules != targets) {
    return absl::InvalidArgumentError(absl::StrCat("the adapter ", adapter.id(), " has the target_modules ", absl::StrJoin(config.target_modules, " "),
                                                   ", but adapter.target_modules is ", absl::StrJoin(targets, " "), "; make them equal"));
  }
  if (std::abs(config.scale() - [&] {
        model::AdapterConfig own = config;
        own.lora_alpha = spec.lora_alpha();
        own.use_rslora = spec.use_rslora();
        return own.scale();
      }()) > 1e-9 * config.scale()) {
    return absl::InvalidArgumentError(absl::StrCat("the adapter ", adapter.id(), " has lora_alpha = ", config.lora_alpha,
                                                   " and use_rslora = ", config.use_rslora ? "true" : "false",
                                                   ", the job another scale; set adapter.lora_alpha and adapter.use_rslora to the same"));
  }
  PPFT_ASSIGN_OR_RETURN(const model::ModelConfig model_config, ConfigOf(model));
  PPFT_ASSIGN_OR_RETURN(const auto file, TensorFile::Open(blobs, *weights));
  return Annotate(model::CheckAdapterFits(config, file->header, model_config, kAdapterFile),
                  absl::StrCat("the adapter ", adapter.id(), " does not fit the model ", model.model().name()));
}

}  // namespace ppft::coordinator
