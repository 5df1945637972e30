// data upload, list, show.
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/format.h"
#include "clients/ppctl/job_file.h"
#include "common/base/format.h"
#include "common/base/status.h"

namespace ppft::ctl {
namespace {

bool IsJobFile(const std::string& target) { return absl::EndsWith(target, ".yaml") || absl::EndsWith(target, ".yml") || target == "-"; }

// A job for one dataset that is named on the command line.
absl::StatusOr<JobFile> JobFor(Context& context, const ShowOptions& options) {
  if (options.base_model.empty() || options.type.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        options.target, " is not a job file (.yaml): say with --base-model and --type how to read it, such as --base-model NAME --type prompt_completion"));
  }
  std::vector<std::string> overrides = {absl::StrCat("model.base_model=", options.base_model), absl::StrCat("data.datasets[0].type=", options.type)};
  overrides.insert(overrides.end(), options.overrides.begin(), options.overrides.end());
  std::string quoted;
  for (const char c : options.target) absl::StrAppend(&quoted, c == '\'' ? "''" : std::string(1, c));
  return JobFile::FromText(context, options.target, absl::StrCat("data: {datasets: [{path: '", quoted, "'}]}\n"), ".", overrides);
}

}  // namespace

Result DataUpload(Context& context, const std::vector<std::string>& files) {
  for (const std::string& file : files) {
    std::error_code error;
    if (!std::filesystem::exists(file, error)) return absl::InvalidArgumentError(absl::StrCat(file, ": there is no such file", NearFile(file)));
    if (!std::filesystem::is_regular_file(file, error)) return absl::InvalidArgumentError(absl::StrCat(file, ": is not a file: name JSONL files"));
    if (std::filesystem::file_size(file, error) == 0) return absl::InvalidArgumentError(absl::StrCat(file, ": is empty"));
  }
  for (const std::string& file : files) {
    PPFT_ASSIGN_OR_RETURN(const v1::Dataset dataset, UploadDataset(context, file));
    if (!context.PrintMessage(dataset))
      context.out() << dataset.id() << (context.format == Format::kName ? "" : absl::StrCat("  ", dataset.name(), "  ", FormatBytes(dataset.size_bytes())))
                    << std::endl;
  }
  return kOk;
}

Result DataList(Context& context) {
  v1::ListDatasetsResponse all;
  PPFT_RETURN_IF_ERROR(context.CallPages(context.datasets(), &v1::DatasetService::StubInterface::ListDatasets, v1::ListDatasetsRequest(), &all));
  if (context.PrintMessage(all)) return kOk;
  std::vector<std::vector<std::string>> rows = {{"ID", "NAME", "SIZE", "CREATED"}};
  for (const v1::Dataset& dataset : all.datasets()) {
    if (context.format == Format::kName) context.out() << dataset.id() << "\n";
    rows.push_back({dataset.id(), Printable(dataset.name()), FormatBytes(dataset.size_bytes()), FormatTime(dataset.create_time(), absl::LocalTimeZone())});
  }
  if (context.format == Format::kTable) context.out() << FormatTable(rows);
  return kOk;
}

Result DataShow(Context& context, const ShowOptions& options) {
  PPFT_ASSIGN_OR_RETURN(JobFile job, IsJobFile(options.target) ? JobFile::Load(context, options.target, options.overrides) : JobFor(context, options));
  PPFT_RETURN_IF_ERROR(job.Report(context));
  PPFT_RETURN_IF_ERROR(job.Resolve(context));
  PPFT_RETURN_IF_ERROR(job.Report(context));
  const int count = job.spec().data().datasets_size();
  if (options.dataset < 0 || options.dataset >= count) {
    return absl::InvalidArgumentError(absl::StrCat("--dataset ", options.dataset, ": the job has datasets 0 to ", count - 1));
  }
  v1::DatasetSpec shown = job.spec().data().datasets(options.dataset);
  job.mutable_spec()->mutable_data()->clear_test_datasets();
  if (!IsDatasetId(shown.path())) {
    const std::string base = IsJobFile(options.target) ? std::filesystem::path(options.target).parent_path().string() : "";
    const std::filesystem::path path =
        std::filesystem::path(shown.path()).is_absolute() ? std::filesystem::path(shown.path()) : std::filesystem::path(base) / shown.path();
    PPFT_ASSIGN_OR_RETURN(const v1::Dataset dataset, UploadDataset(context, path.string()));
    shown.set_path(dataset.id());
  }
  v1::PreviewDatasetRequest request;
  request.set_base_model(job.spec().model().base_model());
  *request.mutable_data() = job.spec().data();
  request.mutable_data()->clear_datasets();
  *request.mutable_data()->add_datasets() = shown;
  request.set_num_rows(options.num_rows);
  v1::PreviewDatasetResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.datasets(), &v1::DatasetService::StubInterface::PreviewDataset, request, &response));
  if (context.PrintMessage(response)) return kOk;
  for (const auto& row : response.rows()) context.out() << FormatPreviewRow(row, context.terminal().color) << "\n";
  return kOk;
}

}  // namespace ppft::ctl
