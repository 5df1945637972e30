// Assembles artifacts of files that a script wrote, so that an oracle can load the result.
// Usage: artifacts_assemble_probe DATA_DIR MODEL_DIR OUT_DIR R ALPHA USE_RSLORA TARGETS KIND:FILE…   with KIND adapter | merged | checkpoint
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "coordinator/artifacts/artifacts.h"
#include "coordinator/artifacts/assembly.h"
#include "tests/coordinator/artifacts/inline_controller.h"

namespace ppft::coordinator {
namespace {

absl::Status CopyOut(BlobStore& blobs, const v1::ArtifactManifest& manifest, const std::string& folder) {
  PPFT_RETURN_IF_ERROR(MakeDirs(folder));
  for (const v1::FileRef& file : manifest.files()) std::filesystem::copy_file(blobs.PathOf(file.sha256()), JoinPath(folder, file.name()));
  return absl::OkStatus();
}

std::vector<v1::MetricRow> Rows() {
  std::vector<v1::MetricRow> rows(4);
  rows[0].set_step(0);
  rows[0].set_eval_loss(2.0 / 3);
  for (int i = 1; i <= 2; ++i) {
    rows[static_cast<size_t>(i)].set_step(i);
    rows[static_cast<size_t>(i)].set_epoch(0.1 * i);
    rows[static_cast<size_t>(i)].set_loss(1.0 / (i + 2));
    rows[static_cast<size_t>(i)].set_learning_rate(1e-4 / i);
    rows[static_cast<size_t>(i)].set_grad_norm(0.1 + 0.2);
  }
  rows[3].set_step(2);
  rows[3].set_epoch(0.2);
  rows[3].set_eval_loss(0.3);
  return rows;
}

absl::Status Run(const std::vector<std::string>& args) {
  PPFT_RETURN_IF_ERROR(MakeDirs(args[0]));
  PPFT_ASSIGN_OR_RETURN(std::unique_ptr<JobStore> store, OpenSqliteJobStore(args[0]));
  InlineController controller(std::move(store));
  PPFT_ASSIGN_OR_RETURN(const auto artifacts, Artifacts::Open({args[0], {std::filesystem::path(args[1]).parent_path().string()}, PPFT_PREPARE}));
  BlobStore& blobs = artifacts->blobs();
  PrepareRunner prepare(&blobs, PPFT_PREPARE);
  ModelRegistry models(&blobs, &prepare, {std::filesystem::path(args[1]).parent_path().string()});
  v1::RegisterModelRequest request;
  request.set_request_id("r");
  request.set_name("base");
  request.set_path(args[1]);
  PPFT_RETURN_IF_ERROR(models.Register(controller, request, nullptr).status());

  AssembleInput input;
  input.job_id = "job-1";
  PPFT_ASSIGN_OR_RETURN(input.model, controller.Run([](JobStore& s) { return s.GetModel("base"); }));
  v1::AdapterSpec* adapter = input.spec.mutable_adapter();
  adapter->set_r(std::stoi(args[3]));
  adapter->set_lora_alpha(std::stod(args[4]));
  adapter->set_use_rslora(args[5] == "1");
  for (const absl::string_view target : absl::StrSplit(args[6], ',')) adapter->add_target_modules(std::string(target));
  input.status.set_step(2);
  input.status.set_total_steps(2);
  input.status.set_epoch(0.2);
  input.status.set_best_metric(0.3);
  input.status.set_best_step(2);
  input.metrics = Rows();
  v1::CheckpointManifest checkpoint;
  checkpoint.mutable_state()->set_step(1);
  std::map<std::string, bool> formats;
  for (size_t i = 7; i < args.size(); ++i) {
    const std::pair<std::string, std::string> kind_and_path = absl::StrSplit(args[i], absl::MaxSplits(':', 1));
    PPFT_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(kind_and_path.second));
    PPFT_ASSIGN_OR_RETURN(const v1::FileRef file, blobs.AddBytes(bytes, std::filesystem::path(kind_and_path.second).filename().string()));
    if (kind_and_path.first == "checkpoint") {
      *checkpoint.add_files() = file;
      continue;
    }
    formats[kind_and_path.first] = true;
    input.exports.emplace_back();
    input.exports.back().set_step(2);
    v1::LocalFile* local = kind_and_path.first == "adapter" ? input.exports.back().add_adapter_files() : input.exports.back().add_merged_files();
    *local->mutable_content() = file;
  }
  for (const auto& [format, wanted] : formats) input.spec.mutable_output()->add_formats(format);
  PPFT_ASSIGN_OR_RETURN(const std::vector<v1::ArtifactManifest> manifests, artifacts->work()->Assemble(input));
  for (const v1::ArtifactManifest& manifest : manifests) PPFT_RETURN_IF_ERROR(CopyOut(blobs, manifest, JoinPath(args[2], manifest.type())));
  if (checkpoint.files().empty()) return absl::OkStatus();
  v1::Job job;
  job.set_id("job-1");
  *job.mutable_spec() = input.spec;
  *job.mutable_status() = input.status;
  PPFT_ASSIGN_OR_RETURN(const v1::ArtifactManifest manifest, AssembleCheckpointAdapter(blobs, job, input.model, checkpoint, input.metrics));
  return CopyOut(blobs, manifest, JoinPath(args[2], "checkpoint"));
}

}  // namespace
}  // namespace ppft::coordinator

int main(int argc, char** argv) {
  if (argc < 9) return 2;
  const absl::Status status = ppft::coordinator::Run(std::vector<std::string>(argv + 1, argv + argc));
  if (!status.ok()) std::cerr << status.ToString() << "\n";
  return status.ok() ? 0 : 1;
}
