// Trainer: what happens after the last step. Each rank of replica 0 writes its part; then the files are read back, and a probe sequence goes through the
// pipeline with what is in memory and with what was read.
#include <ATen/ops/abs.h>
#include <ATen/ops/max.h>
#include <ATen/ops/sub.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status.h"
#include "common/model/inventory.h"
#include "common/model/memory.h"
#include "common/pipeline/lowering.h"
#include "common/pipeline/schedule.h"
#include "worker/trainer/checkpoint/adapter_file.h"
#include "worker/trainer/checkpoint/merged_file.h"
#include "worker/trainer/engine/failure.h"
#include "worker/trainer/engine/stats_thread.h"
#include "worker/trainer/engine/trainer.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

// Of a verification, whatever the vocabulary: reports and manifests stay small.
constexpr int64_t kLogits = 256;
constexpr int64_t kLikeliest = 64;

absl::StatusOr<at::ScalarType> MergeType(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  return absl::InvalidArgumentError(absl::StrCat("output.merge_dtype \"", name, "\" is unknown: use float32, bfloat16 or float16"));
}

// How far logits may lie from those in memory: rounding of the matrix products, and of the weights where they were narrowed.
double Tolerance(const std::string& type, const std::string& merge_dtype, at::ScalarType compute) {
  if (type == "adapter") return 1e-5;
  if (merge_dtype == "bfloat16" || compute == at::kBFloat16) return 0.1;
  if (merge_dtype == "float16" || compute == at::kHalf) return 0.02;
  return 1e-3;
}

absl::Status DiskReason(const absl::Status& status) {
  return absl::IsResourceExhausted(status) ? WithReason(status, "DISK_FULL", "OPERATOR", "free space on the worker's disk") : status;
}

// The likeliest tokens and every n-th of the vocabulary, ascending.
std::vector<int32_t> SampledTokens(const float* logits, int64_t vocab) {
  std::vector<int32_t> ids(static_cast<size_t>(vocab));
  std::iota(ids.begin(), ids.end(), 0);
  if (vocab <= kLogits) return ids;
  std::partial_sort(ids.begin(), ids.begin() + kLikeliest, ids.end(),
                    [&](int32_t a, int32_t b) { return std::make_pair(-logits[a], a) < std::make_pair(-logits[b], b); });
  ids.resize(kLikeliest);
  for (int64_t i = 0; i < kLogits - kLikeliest; ++i) ids.push_back(static_cast<int32_t>(i * vocab / (kLogits - kLikeliest)));
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

FileOnDisk Named(const WrittenFile& file, const std::string& name) { return {file.path, name, file.sha256, file.size_bytes}; }

}  // namespace

absl::Status Trainer::WriteArtifacts(ExportWritten* written, std::string* adapter_path, std::string* merged_path) {
  const std::string adapter_name = absl::StrFormat("adapter-rank-%d.safetensors", config_.me().pipeline_rank);
  absl::StatusOr<WrittenFile> adapter = WriteAdapterFile(JoinPath(config_.directory, adapter_name), Stages());
  PPFT_RETURN_IF_ERROR(DiskReason(adapter.status()));
  written->adapter_files.push_back(Named(*adapter, adapter_name));
  *adapter_path = adapter->path;
  if (!config_.write_merged) return absl::OkStatus();
  activity_.Enter(Section::kExport);
  PPFT_ASSIGN_OR_RETURN(const at::ScalarType dtype, MergeType(config_.merge_dtype));
  const std::string merged_name = absl::StrFormat("merged-rank-%d.safetensors", config_.me().pipeline_rank);
  absl::StatusOr<WrittenFile> merged = WriteMergedFile(JoinPath(config_.directory, merged_name), Stages(), dtype, [this] { activity_.Progress(); });
  PPFT_RETURN_IF_ERROR(DiskReason(merged.status()));
  written->merged_files.push_back(Named(*merged, merged_name));
  *merged_path = merged->path;
  return absl::OkStatus();
}

absl::Status Trainer::Export() {
  activity_.Enter(Section::kExport);
  if (transport_ != nullptr) transport_->WaitWithoutLimit();
  ExportWritten written;
  written.step = state_.step;
  if (cuda_ != nullptr) cuda_->Synchronize(0);
  for (StageModel* stage : Stages()) stage->EndSteps();
  if (config_.load_best_model_at_end && adapter_->has_best()) {
    adapter_->UseBest();
    written.step = state_.best_step;
  }
  if (config_.me().replica != 0) {
    if (config_.verify && shares_layers()) PPFT_RETURN_IF_ERROR(HelpVerify());
    LogPeakMemory();
    return absl::OkStatus();
  }
  std::string adapter_path, merged_path;
  PPFT_RETURN_IF_ERROR(WriteArtifacts(&written, &adapter_path, &merged_path));
  if (config_.verify) PPFT_RETURN_IF_ERROR(Verify(adapter_path, merged_path, &written.verifications));
  PPFT_RETURN_IF_ERROR(TransportStatus());
  LogPeakMemory();
  reporter_->Exported(written);
  return absl::OkStatus();
}

std::vector<int32_t> Trainer::Probe() const {
  const data::TokenRows& rows = train_data_->rows();
  std::vector<int32_t> probe;
  for (int64_t i = 0; i < std::min(rows.length(0), model::kProbeTokens); ++i)
    probe.push_back(static_cast<int32_t>(rows.ids[static_cast<size_t>(rows.offsets[0] + i)]));
  return probe;
}

absl::Status Trainer::AwaitAll() {
  activity_.Enter(Section::kAwaitExport);
  PPFT_RETURN_IF_ERROR(world_->Barrier());
  activity_.Enter(Section::kExport);
  return absl::OkStatus();
}

absl::Status Trainer::HelpVerify() {
  at::Tensor logits;
  PPFT_RETURN_IF_ERROR(AwaitAll());
  PPFT_RETURN_IF_ERROR(ProbeLogits(Probe(), &logits));  // what is in memory
  PPFT_RETURN_IF_ERROR(AwaitAll());
  return ProbeLogits(Probe(), &logits);  // the adapter that replica 0 has read back
}

absl::Status Trainer::ProbeLogits(const std::vector<int32_t>& probe, at::Tensor* logits) {
  PPFT_ASSIGN_OR_RETURN(const std::vector<pipeline::Program> forward, pipeline::BuildForwardOnly(plan().pipeline_parallel_size, plan().virtual_stages, 1));
  PPFT_ASSIGN_OR_RETURN(const std::vector<pipeline::Program> lowered, pipeline::Lower(forward, mesh_.num_stages()));
  PassOptions options;
  options.pass = next_pass_++;
  options.announced = true;
  options.last_stage = [&](StageModel& stage, const MicrobatchInput& input, const at::Tensor& hidden_in) -> absl::Status {
    std::vector<int64_t> rows(probe.size());
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int64_t>(i);
    PPFT_ASSIGN_OR_RETURN(*logits, stage.Logits(input, hidden_in, rows));
    *logits = logits->clone();
    return absl::OkStatus();
  };
  double unused = 0;
  return interpreter_->Run(lowered[static_cast<size_t>(config_.me().pipeline_rank)], {ProbeInput(probe)}, options, &unused);
}

absl::StatusOr<std::array<double, 2>> Trainer::DifferenceToAll(const at::Tensor& a, const at::Tensor& b) {
  std::array<double, 2> difference = {0, 0};
  if (a.defined()) {
    const double largest = at::max(at::abs(b)).item<double>();
    difference[0] = at::max(at::abs(at::sub(a, b))).item<double>();
    difference[1] = difference[0] / std::max(largest, 1e-30);
  }
  // The last stage alone knows it; all of replica 0 decide on it.
  std::vector<int> pipeline = mesh_.PipelineOf(0);
  Group group(transport_.get(), 1000 + static_cast<int>(next_pass_++), std::move(pipeline));
  activity_.Enter(Section::kAwaitExport);
  PPFT_RETURN_IF_ERROR(group.AllReduceSum(absl::Span<double>(difference.data(), difference.size())));
  activity_.Enter(Section::kExport);
  return difference;
}

absl::StatusOr<std::map<int, std::unique_ptr<StageModel>>> Trainer::MergedStages(const std::string& merged_path) {
  PPFT_ASSIGN_OR_RETURN(const TensorSource file, SourceOfFiles({merged_path}));
  PPFT_ASSIGN_OR_RETURN(const at::ScalarType dtype, MergeType(config_.merge_dtype));
  // A tied head uses the embedding, which the first stage's shard holds: here it is the base model's, which training does not change.
  const TensorSource source = [this, file, dtype](const std::string& name) -> absl::StatusOr<at::Tensor> {
    activity_.Progress();
    absl::StatusOr<at::Tensor> tensor = file(name);
    if (tensor.ok() || name != model::kEmbeddingName) return tensor;
    PPFT_ASSIGN_OR_RETURN(const at::Tensor base, base_(name));
    return base.to(dtype);
  };
  std::map<int, std::unique_ptr<StageModel>> stages;
  for (const int stage : config_.me().stages) {
    StageOptions options = OptionsOf(stage);
    options.lora.target_modules.clear();
    // One short document goes through it, once.
    options.least_tokens = 0;
    options.capture = false;
    // The file lies on this rank alone, and the whole of it may be more than fits.
    options.weights = WeightHome::kStreamed;
    PPFT_ASSIGN_OR_RETURN(stages[stage], factory_(model_config_, options, source));
  }
  return stages;
}

void Trainer::DropTrainedModel() {
  if (cuda_ != nullptr) cuda_->Synchronize(0);
  interpreter_->SetStages({});
  adapter_.reset();
  stages_.clear();
}

absl::Status Trainer::Verify(const std::string& adapter_path, const std::string& merged_path, std::vector<Verification>* verifications) {
  return CatchTorch("verification", [&]() -> absl::Status {
    const std::vector<int32_t> probe = Probe();
    at::Tensor own, read;
    if (shares_layers()) PPFT_RETURN_IF_ERROR(AwaitAll());  // HelpVerify goes along
    PPFT_RETURN_IF_ERROR(ProbeLogits(probe, &own));

    const auto compare = [&](const std::string& type) -> absl::Status {
      PPFT_ASSIGN_OR_RETURN(const auto both, DifferenceToAll(read, own));
      const double difference = both[1];
      const double tolerance = Tolerance(type, config_.merge_dtype, compute_);
      if (!(difference <= tolerance)) {
        const bool narrowed = type == "merged" && config_.merge_dtype != "float32";
        return WithReason(
            absl::DataLossError(absl::StrFormat("the %s read back from disk gives logits that differ by %.3g, more than %.3g", type, difference, tolerance)),
            "EXPORT_MISMATCH", "INFRASTRUCTURE",
            narrowed ? absl::StrCat("the merged weights may not fit into ", config_.merge_dtype,
                                    ": set output.merge_dtype: float32, or take the adapter of the newest checkpoint with ppctl fetch --checkpoint latest")
                     : "look at the worker's disk and memory; the adapter of the newest checkpoint can be had with ppctl fetch --checkpoint latest");
      }
      if (!own.defined()) return absl::OkStatus();
      Verification verification;
      verification.type = type;
      verification.max_absolute_difference = both[0];
      verification.max_relative_difference = difference;
      verification.probe_ids = probe;
      const at::Tensor last = own.select(0, own.size(0) - 1).to(at::kFloat).contiguous();
      verification.logit_ids = SampledTokens(last.data_ptr<float>(), last.numel());
      for (const int32_t id : verification.logit_ids) verification.last_logits.push_back(last.data_ptr<float>()[id]);
      verifications->push_back(std::move(verification));
      return absl::OkStatus();
    };

    activity_.Enter(Section::kExport);
    const std::vector<float> masters = adapter_->CopyMasters();
    PPFT_ASSIGN_OR_RETURN(const TensorSource adapter_file, SourceOfFiles({adapter_path}));
    adapter_->SetMasters(std::vector<float>(masters.size(), 0.0f));  // nothing of the comparison may come from memory
    PPFT_RETURN_IF_ERROR(adapter_->LoadMasters(adapter_file));
    if (shares_layers()) PPFT_RETURN_IF_ERROR(AwaitAll());
    PPFT_RETURN_IF_ERROR(ProbeLogits(probe, &read));
    PPFT_RETURN_IF_ERROR(compare("adapter"));
    adapter_->SetMasters(masters);
    if (merged_path.empty()) return absl::OkStatus();

    DropTrainedModel();
    PPFT_ASSIGN_OR_RETURN(const auto merged, MergedStages(merged_path));
    std::map<int, StageModel*> map;
    for (const auto& [stage, model] : merged) map[stage] = model.get();
    interpreter_->SetStages(std::move(map));
    PPFT_RETURN_IF_ERROR(ProbeLogits(probe, &read));
    interpreter_->SetStages({});
    return compare("merged");
  });
}

}  // namespace ppft::trainer
