// models register, upload, list.
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/format.h"
#include "common/base/files.h"
#include "common/base/format.h"
#include "common/base/status.h"

namespace ppft::ctl {
namespace {

namespace fs = std::filesystem;

// Every weight is read and hashed.
constexpr absl::Duration kRegisterTime = absl::Minutes(30);

Result Register(Context& context, const v1::RegisterModelRequest& request) {
  if (!context.timeout_given) context.timeout = std::max(context.timeout, kRegisterTime);
  v1::Model model;
  PPFT_RETURN_IF_ERROR(context.Call(context.models(), &v1::ModelService::StubInterface::RegisterModel, request, &model));
  if (context.format == Format::kName) {
    context.out() << model.name() << "\n";
  } else if (!context.PrintMessage(model)) {
    context.out() << model.name() << "  " << model.architecture() << "  " << FormatCount(static_cast<double>(model.num_parameters())) << " parameters, "
                  << Counted(model.num_layers(), "layer") << ", " << model.dtype() << "\n";
  }
  return kOk;
}

// What a model folder is made of. Pickle files stay where they are.
bool IsModelFile(const std::string& name) {
  for (const char* ending : {".json", ".safetensors", ".model", ".jinja", "merges.txt", "vocab.txt"}) {
    if (absl::EndsWith(name, ending)) return true;
  }
  return false;
}

}  // namespace

Result ModelsRegister(Context& context, const std::string& name, const std::string& path) {
  v1::RegisterModelRequest request;
  request.set_request_id(NewRequestId());
  request.set_name(name);
  std::error_code error;
  // A relative path means this machine's folder, which the coordinator may see under the same name.
  request.set_path(fs::exists(path, error) ? fs::absolute(path).lexically_normal().string() : path);
  return Register(context, request);
}

Result ModelsUpload(Context& context, const std::string& name, const std::string& folder) {
  std::error_code error;
  if (!fs::is_directory(folder, error)) return absl::InvalidArgumentError(absl::StrCat(folder, ": there is no such folder"));
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDir(folder));
  v1::RegisterModelRequest request;
  request.set_request_id(NewRequestId());
  request.set_name(name);
  request.mutable_files()->set_source(folder);
  std::vector<std::string> files;
  bool config = false, weights = false;
  for (const std::string& file : names) {
    if (!IsModelFile(file) || !fs::is_regular_file(fs::path(folder) / file, error)) continue;
    config |= file == "config.json";
    weights |= absl::EndsWith(file, ".safetensors");
    files.push_back(file);
  }
  if (!config) return absl::InvalidArgumentError(absl::StrCat(folder, ": has no config.json: name a Hugging Face model folder"));
  if (!weights) {
    return absl::InvalidArgumentError(
        absl::StrCat(folder, ": has no *.safetensors: convert the weights with save_pretrained(…, safe_serialization=True); pickle files are never read"));
  }
  for (const std::string& file : files) {
    auto uploaded = net::UploadFile(context.blobs(), (fs::path(folder) / file).string(), context.Transfers(absl::StrCat("uploading ", file)));
    context.EndProgress();
    if (!uploaded.ok()) return context.Explain(uploaded.status());
    context.Reached();
    *request.mutable_files()->add_files() = *std::move(uploaded);
  }
  return Register(context, request);
}

Result ModelsList(Context& context) {
  v1::ListModelsResponse all;
  PPFT_RETURN_IF_ERROR(context.CallPages(context.models(), &v1::ModelService::StubInterface::ListModels, v1::ListModelsRequest(), &all));
  if (context.PrintMessage(all)) return kOk;
  std::vector<std::vector<std::string>> rows = {{"NAME", "ARCHITECTURE", "PARAMETERS", "LAYERS", "CONTEXT", "TYPE", "SIZE"}};
  for (const v1::Model& model : all.models()) {
    if (context.format == Format::kName) context.out() << model.name() << "\n";
    rows.push_back({model.name(), model.architecture(), FormatCount(static_cast<double>(model.num_parameters())), absl::StrCat(model.num_layers()),
                    absl::StrCat(model.max_position_embeddings()), model.dtype(), FormatBytes(model.size_bytes())});
  }
  if (context.format == Format::kTable) context.out() << FormatTable(rows);
  return kOk;
}

}  // namespace ppft::ctl
