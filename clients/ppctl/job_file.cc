#include "clients/ppctl/job_file.h"

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <tuple>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "clients/ppctl/format.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/spec/suggest.h"

namespace ppft::ctl {
namespace {

namespace fs = std::filesystem;

// Every weight is read and hashed.
constexpr absl::Duration kRegisterTime = absl::Minutes(30);
// With a file that is wrong anyway, for a coordinator that does not answer.
constexpr absl::Duration kPatienceForMore = absl::Seconds(5);
constexpr const char* kAdapterFiles[] = {"adapter_config.json", "adapter_model.safetensors"};

bool IsIdWith(const std::string& text, absl::string_view prefix, size_t digits, bool hex) {
  if (!absl::StartsWith(text, prefix) || text.size() != prefix.size() + digits) return false;
  return std::all_of(text.begin() + static_cast<long>(prefix.size()), text.end(),
                     [hex](char c) { return absl::ascii_isdigit(c) || (hex ? c >= 'a' && c <= 'f' : absl::ascii_islower(c)); });
}

bool IsArtifactId(const std::string& text) { return IsIdWith(text, "adapter-", 16, true) || IsIdWith(text, "job-", 8, false); }

// A path in job.yaml is relative to that file.
std::string Resolved(const std::string& path, const std::string& base_folder) {
  return fs::path(path).is_absolute() ? path : (fs::path(base_folder) / path).string();
}

absl::Status WrongInput(const std::string& subject, size_t count) {
  return absl::InvalidArgumentError(absl::StrCat(subject, ": ", count == 1 ? "1 error" : absl::StrCat(count, " errors")));
}

absl::StatusOr<std::string> ReadInput(const std::string& file) {
  if (file == "-") return std::string(std::istreambuf_iterator<char>(std::cin), {});
  std::error_code error;
  if (fs::is_directory(file, error)) return absl::InvalidArgumentError(absl::StrCat(file, ": is a folder; name the job file in it"));
  if (fs::status(file, error).type() == fs::file_type::not_found)
    return absl::InvalidArgumentError(absl::StrCat(file, ": there is no such file", NearFile(file)));
  auto text = ReadFile(file, int64_t{1} << 26);
  if (!text.ok()) return absl::InvalidArgumentError(text.status().message());
  return text;
}

}  // namespace

std::string NearFile(const std::string& path) {
  const fs::path folder = fs::path(path).parent_path();
  const absl::StatusOr<std::vector<std::string>> names = ListDir(folder.empty() ? "." : folder.string());
  if (!names.ok()) return "";
  std::vector<std::string> files;
  std::error_code error;
  for (const std::string& name : *names) {
    if (fs::is_regular_file(folder / name, error)) files.push_back(name);
  }
  const std::string nearest = spec::NearestName(fs::path(path).filename().string(), files);
  return nearest.empty() ? "" : absl::StrCat("; did you mean ", (folder / nearest).string(), "?");
}

bool IsDatasetId(const std::string& text) { return IsIdWith(text, "ds-", 16, true); }

absl::StatusOr<JobFile> JobFile::Load(Context& context, const std::string& file, const std::vector<std::string>& overrides) {
  PPFT_ASSIGN_OR_RETURN(const std::string text, ReadInput(file));
  return FromText(context, file == "-" ? "standard input" : file, text, file == "-" ? "." : fs::path(file).parent_path().string(), overrides);
}

absl::StatusOr<JobFile> JobFile::FromText(Context& context, const std::string& name, const std::string& text, const std::string& base_folder,
                                          const std::vector<std::string>& overrides) {
  JobFile job;
  job.subject_ = name;
  job.parsed_ = spec::Parse(name, text, overrides);
  for (const spec::FieldError& error : job.parsed_.errors) job.Complain(error);
  job.FindLocalFiles(job.parsed_.spec.mutable_data()->mutable_datasets(), "data.datasets", base_folder);
  job.FindLocalFiles(job.parsed_.spec.mutable_data()->mutable_test_datasets(), "data.test_datasets", base_folder);
  job.CheckLocalFiles();
  job.CheckAdapterFolder(base_folder);
  return job;
}

void JobFile::FindLocalFiles(google::protobuf::RepeatedPtrField<v1::DatasetSpec>* datasets, const std::string& field, const std::string& base_folder) {
  for (int i = 0; i < datasets->size(); ++i) {
    v1::DatasetSpec* dataset = datasets->Mutable(i);
    if (dataset->path().empty() || IsDatasetId(dataset->path())) {
      all_rows_seen_ = false;
      continue;
    }
    local_files_.push_back({dataset, absl::StrCat(field, "[", i, "].path"), Resolved(dataset->path(), base_folder)});
  }
}

spec::FieldError JobFile::At(const std::string& field, const std::string& message) const {
  v1::Violation violation;
  violation.set_field(field);
  violation.set_message(message);
  return parsed_.Locate(violation);
}

void JobFile::CheckLocalFiles() {
  for (const LocalFile& local : local_files_) CheckLocalFile(local);
}

void JobFile::CheckLocalFile(const LocalFile& local) {
  std::error_code error;
  const fs::file_status status = fs::status(local.path, error);
  if (!fs::exists(status)) {
    const std::string near = NearFile(local.path);
    return Complain(At(local.field, absl::StrCat("there is no file ", local.path, near.empty() ? ": c" : absl::StrCat(near, " C"),
                                                 "orrect the path (relative to the job file), or use a dataset id (ppctl data list)")));
  }
  if (!fs::is_regular_file(status)) return Complain(At(local.field, absl::StrCat(local.path, " is not a file: name one JSONL file")));
  const auto bytes = MappedFile::Open(local.path);
  if (!bytes.ok()) return Complain(At(local.field, std::string(bytes.status().message())));
  const v1::DatasetSpec& dataset = *local.dataset;
  if (dataset.type().empty()) return;  // already refused
  const std::map<std::string, std::string> field_map(dataset.field_map().begin(), dataset.field_map().end());
  const absl::StatusOr<data::RowTotals> totals = data::MeasureRows(dataset.source(), bytes->bytes(), dataset.type(), field_map);
  if (totals.ok()) return Count(local, *totals);
  const absl::Status& rows = totals.status();
  const bool known = absl::IsInvalidArgument(rows) && !parsed_.ok() && data::MakeRowFormat(dataset.source(), dataset.type(), field_map).status() == rows;
  if (!known) complaints_.push_back({At(local.field, ""), std::string(rows.message())});
}

void JobFile::Count(const LocalFile& local, const data::RowTotals& totals) {
  if (!absl::StartsWith(local.field, "data.datasets")) return;
  const v1::DataSpec& data = parsed_.spec.data();
  int64_t prefixes = 0;
  if (local.dataset->type() == "summarization") prefixes = totals.rows * static_cast<int64_t>(data.instruction_prefix().size() + data.response_prefix().size());
  text_bytes_ += totals.context_bytes + totals.answer_bytes + prefixes;
  answer_bytes_ += data.train_on_inputs() ? totals.context_bytes + totals.answer_bytes + prefixes : totals.answer_bytes;
}

double JobFile::supervised_ratio() const {
  return all_rows_seen_ && text_bytes_ > 0 ? static_cast<double>(answer_bytes_) / static_cast<double>(text_bytes_) : 0;
}

void JobFile::CheckAdapterFolder(const std::string& base_folder) {
  const std::string& adapter = parsed_.spec.model().init_adapter();
  if (adapter.empty()) return;
  const std::string folder = Resolved(adapter, base_folder);
  const auto complain = [this](const std::string& message) {
    adapter_is_wrong_ = true;
    Complain(At("model.init_adapter", message));
  };
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    if (IsArtifactId(adapter)) return;
    return complain(absl::StrCat("there is no folder ", folder, ": name a PEFT adapter's folder or an artifact id (adapter-… or a job's id)"));
  }
  for (const char* file : kAdapterFiles) {
    if (!fs::is_regular_file(fs::path(folder) / file, error)) {
      return complain(absl::StrCat(folder, " has no file ", file, ": save the adapter with PEFT's save_pretrained (safetensors, never pickle)"));
    }
  }
  adapter_folder_ = folder;
}

absl::Status JobFile::NameBaseModel(Context& context) {
  std::string* base = parsed_.spec.mutable_model()->mutable_base_model();
  if (!absl::StrContains(*base, '/')) return absl::OkStatus();
  const std::string path = fs::path(*base).lexically_normal().string();
  const std::string folder = path.back() == '/' ? path.substr(0, path.size() - 1) : path;
  v1::ListModelsRequest list;
  list.set_page_size(1000);
  v1::ListModelsResponse page;
  do {
    PPFT_RETURN_IF_ERROR(context.Call(context.models(), &v1::ModelService::StubInterface::ListModels, list, &page));
    for (const v1::Model& known : page.models()) {
      if (known.path() != folder && (folder[0] == '/' || !absl::EndsWith(known.path(), "/" + folder))) continue;
      *base = known.name();
      return absl::OkStatus();
    }
    list.set_page_token(page.next_page_token());
  } while (!list.page_token().empty());

  base_is_unnamed_ = true;
  if (!complaints_.empty()) return absl::OkStatus();
  v1::RegisterModelRequest request;
  request.set_request_id(NewRequestId());
  request.set_path(folder);
  for (const char c : fs::path(folder).filename().string()) {
    *request.mutable_name() += absl::ascii_isalnum(c) || c == '_' || c == '-' || (c == '.' && !request.name().empty()) ? c : '-';
  }
  const absl::Duration timeout = context.timeout;
  if (!context.timeout_given) context.timeout = std::max(timeout, kRegisterTime);
  v1::Model model;
  const absl::Status registered = context.Call(context.models(), &v1::ModelService::StubInterface::RegisterModel, request, &model);
  context.timeout = timeout;
  if (absl::IsInvalidArgument(registered) || absl::IsAlreadyExists(registered) || absl::IsNotFound(registered)) {
    const char* const remedy = absl::IsAlreadyExists(registered) ? ": `ppctl models register NAME PATH` registers the folder under another name" : "";
    Complain(At("model.base_model", absl::StrCat(registered.message(), remedy)));
    return absl::OkStatus();
  }
  PPFT_RETURN_IF_ERROR(registered);
  *base = model.name();
  base_is_unnamed_ = false;
  return absl::OkStatus();
}

absl::Status JobFile::Resolve(Context& context) {
  if (parsed_.wrong.count("model.base_model") > 0) return absl::OkStatus();
  PPFT_RETURN_IF_ERROR(NameBaseModel(context));
  if (base_is_unnamed_ || parsed_.given.count("data.sequence_len") > 0) return absl::OkStatus();
  v1::GetModelRequest request;
  request.set_name(parsed_.spec.model().base_model());
  v1::Model model;
  const absl::Status status = context.Call(context.models(), &v1::ModelService::StubInterface::GetModel, request, &model);
  if (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) return status;
  // An unknown model is reported by the validation, at its place.
  if (status.ok() && model.max_position_embeddings() > 0) {
    v1::DataSpec* data = parsed_.spec.mutable_data();
    data->set_sequence_len(std::min(data->sequence_len(), model.max_position_embeddings()));
  }
  return absl::OkStatus();
}

absl::Status JobFile::Report(Context& context) const {
  std::vector<Complaint> sorted = complaints_;
  const auto place = [this](const Complaint& complaint) {
    return std::make_tuple(complaint.place.file != parsed_.file, complaint.place.line, complaint.place.column);
  };
  std::stable_sort(sorted.begin(), sorted.end(), [&](const Complaint& a, const Complaint& b) { return place(a) < place(b); });
  for (const Complaint& complaint : sorted) context.err() << Printable(complaint.text) << "\n";
  return sorted.empty() ? absl::OkStatus() : WrongInput(subject_, sorted.size());
}

absl::Status JobFile::Report(Context& context, const google::protobuf::RepeatedPtrField<v1::Violation>& violations) {
  for (const spec::FieldError& error : parsed_.News(parsed_.spec, violations)) Complain(error);
  return Report(context);
}

absl::Status JobFile::Ask(Context& context) {
  v1::ValidateJobRequest request;
  *request.mutable_spec() = parsed_.Judgeable();
  v1::ModelSpec* model = request.mutable_spec()->mutable_model();
  if (!adapter_folder_.empty() || adapter_is_wrong_) model->clear_init_adapter();
  if (base_is_unnamed_) model->clear_base_model();
  v1::ValidateJobResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::ValidateJob, request, &response));
  for (const spec::FieldError& error : parsed_.News(request.spec(), response.violations())) Complain(error);
  return absl::OkStatus();
}

absl::Status JobFile::ValidateOnServer(Context& context) {
  PPFT_RETURN_IF_ERROR(Ask(context));
  return Report(context);
}

absl::Status JobFile::Check(Context& context) {
  const absl::Duration timeout = context.timeout;
  if (!complaints_.empty() && !context.timeout_given) context.timeout = std::min(timeout, kPatienceForMore);
  absl::Status asked = Resolve(context);
  if (asked.ok()) asked = Ask(context);
  context.timeout = timeout;
  if (complaints_.empty()) PPFT_RETURN_IF_ERROR(asked);
  for (const spec::FieldError& warning : parsed_.warnings) context.err() << "warning: " << Printable(spec::ToString(warning)) << "\n";
  const absl::Status wrong = Report(context);
  if (!asked.ok()) context.err() << "whether there is more to correct could not be asked: " << Printable(std::string(asked.message())) << "\n";
  return wrong;
}

absl::StatusOr<v1::Dataset> UploadDataset(Context& context, const std::string& path) {
  const auto file = net::UploadFile(context.blobs(), path, context.Transfers(absl::StrCat("uploading ", fs::path(path).filename().string())));
  context.EndProgress();
  if (!file.ok()) return context.Explain(file.status());
  context.Reached();
  v1::CreateDatasetRequest request;
  request.set_request_id(NewRequestId());
  request.set_name(file->name());
  request.set_sha256(file->sha256());
  v1::Dataset dataset;
  PPFT_RETURN_IF_ERROR(context.Call(context.datasets(), &v1::DatasetService::StubInterface::CreateDataset, request, &dataset));
  return dataset;
}

absl::Status JobFile::Upload(Context& context) {
  for (const LocalFile& local : local_files_) {
    PPFT_ASSIGN_OR_RETURN(const v1::Dataset dataset, UploadDataset(context, local.path));
    local.dataset->set_path(dataset.id());
  }
  local_files_.clear();
  if (adapter_folder_.empty()) return absl::OkStatus();
  v1::CreateAdapterRequest request;
  request.set_request_id(NewRequestId());
  for (const char* name : kAdapterFiles) {
    const auto file = net::UploadFile(context.blobs(), (fs::path(adapter_folder_) / name).string(), context.Transfers(absl::StrCat("uploading ", name)));
    context.EndProgress();
    if (!file.ok()) return context.Explain(file.status());
    *request.add_files() = *file;
  }
  v1::ArtifactManifest adapter;
  const absl::Status created = context.Call(context.artifacts(), &v1::ArtifactService::StubInterface::CreateAdapter, request, &adapter);
  if (absl::IsInvalidArgument(created)) return absl::InvalidArgumentError(spec::ToString(At("model.init_adapter", std::string(created.message()))));
  PPFT_RETURN_IF_ERROR(created);
  parsed_.spec.mutable_model()->set_init_adapter(adapter.id());
  adapter_folder_.clear();
  return absl::OkStatus();
}

}  // namespace ppft::ctl
