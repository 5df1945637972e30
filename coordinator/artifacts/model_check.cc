#include "coordinator/artifacts/model_check.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <map>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/time.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/model/config.h"
#include "common/model/cost.h"
#include "common/model/inventory.h"
#include "common/model/json.h"
#include "common/model/safetensors.h"
#include "coordinator/artifacts/finite.h"
#include "coordinator/artifacts/tokenizer_files.h"

namespace ppft::coordinator {
namespace {

constexpr int64_t kMaxTextFileBytes = 64 << 20;
constexpr int64_t kMaxConfigBytes = 1 << 20;
constexpr size_t kScanBytes = 4 << 20;
constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

struct WeightFile {
  std::string name;
  Fd fd;
  int64_t size_bytes = 0;
};

struct Tensor {
  model::TensorInfo info;
  const WeightFile* file = nullptr;
  std::string sha256;
};

absl::Status Invalid(absl::string_view text) { return absl::InvalidArgumentError(text); }

absl::StatusOr<int64_t> SizeOf(const Fd& fd, absl::string_view what) {
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, what);
  return static_cast<int64_t>(info.st_size);
}

absl::StatusOr<std::string> ReadText(const ModelFolder& folder, const std::string& name, int64_t max_bytes) {
  const std::string path = JoinPath(folder.path(), name);
  PPFT_ASSIGN_OR_RETURN(const Fd fd, folder.Open(name));
  PPFT_ASSIGN_OR_RETURN(const int64_t size, SizeOf(fd, path));
  if (size > max_bytes) return Invalid(absl::StrCat(path, ": ", size, " bytes are more than the allowed ", max_bytes));
  std::string text(static_cast<size_t>(size), '\0');
  PPFT_RETURN_IF_ERROR(ReadAt(fd.get(), text.data(), static_cast<int64_t>(text.size()), 0, path));
  return text;
}

bool IsPickle(absl::string_view name) {
  return absl::EndsWith(name, ".bin") || absl::EndsWith(name, ".pt") || absl::EndsWith(name, ".pth") || absl::EndsWith(name, ".ckpt") ||
         absl::EndsWith(name, ".pkl");
}

// Names of the weight files, as transformers chooses: one file, else the index's shards, else every safetensors file there is.
absl::StatusOr<std::vector<std::string>> WeightFileNames(const ModelFolder& folder, const std::vector<std::string>& names,
                                                         std::map<std::string, std::string>* index) {
  const std::set<std::string> there(names.begin(), names.end());
  if (there.count(kSingleFile) != 0) return std::vector<std::string>{kSingleFile};
  if (there.count(kIndexFile) != 0) {
    const std::string path = JoinPath(folder.path(), kIndexFile);
    PPFT_ASSIGN_OR_RETURN(const std::string text, ReadText(folder, kIndexFile, kMaxTextFileBytes));
    PPFT_ASSIGN_OR_RETURN(*index, model::ParseSafetensorsIndex(text, path));
    std::set<std::string> shards;
    for (const auto& [tensor, file] : *index) {
      if (there.count(file) == 0) return Invalid(absl::StrCat(path, ": names the file ", file, ", which is not in the folder; download it too"));
      shards.insert(file);
    }
    if (shards.empty()) return Invalid(absl::StrCat(path, ": names no tensor"));
    return std::vector<std::string>(shards.begin(), shards.end());
  }
  std::vector<std::string> weights;
  std::string pickle;
  for (const std::string& name : names) {
    if (absl::EndsWith(name, ".safetensors")) weights.push_back(name);
    if (IsPickle(name)) pickle = name;
  }
  if (!weights.empty()) return weights;
  if (!pickle.empty()) {
    return Invalid(absl::StrCat(
        JoinPath(folder.path(), pickle),
        ": pickle files can run code and are never opened; the weights must be safetensors: take the model's safetensors files, or convert them on a trusted "
        "machine with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"));
  }
  return Invalid(absl::StrCat(folder.path(), ": no weights: expected ", kSingleFile, ", or ", kIndexFile, " with its shards"));
}

// Opens the files and gathers their tensors; names are unique over all files and agree with the index.
absl::Status ReadHeaders(const ModelFolder& folder, const std::vector<std::string>& names, const std::map<std::string, std::string>& index,
                         std::vector<WeightFile>* files, std::vector<Tensor>* tensors) {
  std::map<std::string, std::string> file_of;
  files->reserve(names.size());  // tensors point into it
  for (const std::string& name : names) {
    const std::string path = JoinPath(folder.path(), name);
    WeightFile file{name, Fd(), 0};
    PPFT_ASSIGN_OR_RETURN(file.fd, folder.Open(name));
    PPFT_ASSIGN_OR_RETURN(file.size_bytes, SizeOf(file.fd, path));
    PPFT_ASSIGN_OR_RETURN(model::SafetensorsHeader header, model::ReadSafetensorsHeader(file.fd.get(), file.size_bytes, path));
    files->push_back(std::move(file));
    for (model::TensorInfo& info : header.tensors) {
      const auto [other, is_new] = file_of.emplace(info.name, name);
      if (!is_new) return Invalid(absl::StrCat(path, ": the tensor ", info.name, " is in ", other->second, " too; keep one of them"));
      tensors->push_back({std::move(info), &files->back(), ""});
    }
  }
  for (const auto& [tensor, file] : index) {
    const auto found = file_of.find(tensor);
    if (found == file_of.end() || found->second != file) {
      return Invalid(absl::StrCat(JoinPath(folder.path(), kIndexFile), ": says that ", tensor, " is in ", file, ", but it is ",
                                  found == file_of.end() ? "nowhere" : absl::StrCat("in ", found->second), "; download the model again"));
    }
  }
  return absl::OkStatus();
}

absl::Status ScanTensor(const std::string& path, Tensor& tensor, std::string& buffer, const std::function<bool()>& cancelled) {
  Sha256 sha;
  for (int64_t done = 0; done < tensor.info.size_bytes;) {
    if (cancelled && cancelled()) return absl::CancelledError("the caller has gone");
    const size_t size = static_cast<size_t>(std::min<int64_t>(tensor.info.size_bytes - done, static_cast<int64_t>(buffer.size())));
    PPFT_RETURN_IF_ERROR(ReadAt(tensor.file->fd.get(), buffer.data(), size, tensor.info.offset + done, path));
    if (HasNonFiniteBytes(tensor.info.dtype, absl::string_view(buffer.data(), size))) {
      return Invalid(absl::StrCat(path, ": the tensor ", tensor.info.name,
                                  " holds NaN or infinite weights; the file is damaged or the model diverged: take another copy"));
    }
    sha.Update(absl::string_view(buffer.data(), size));
    done += static_cast<int64_t>(size);
  }
  tensor.sha256 = sha.HexDigest();
  return absl::OkStatus();
}

// All tensors, by several threads. The error of the first bad tensor in order, whatever the threads' order was.
absl::Status ScanTensors(const ModelFolder& folder, std::vector<Tensor>& tensors, int threads, const std::function<bool()>& cancelled) {
  std::atomic<size_t> next{0};
  std::vector<absl::Status> results(tensors.size());
  const auto work = [&] {
    std::string buffer(kScanBytes, '\0');
    for (size_t i = next.fetch_add(1); i < tensors.size(); i = next.fetch_add(1)) {
      results[i] = ScanTensor(JoinPath(folder.path(), tensors[i].file->name), tensors[i], buffer, cancelled);
      if (!results[i].ok()) next = tensors.size();
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  for (absl::Status& result : results) PPFT_RETURN_IF_ERROR(result);
  return absl::OkStatus();
}

// True if the files hold a head that is not the embedding, although config.json ties them: transformers then uses both as they are.
absl::StatusOr<bool> HeadDiffers(const ModelFolder& folder, const model::ModelConfig& config, std::vector<Tensor>& tensors,
                                 const std::function<bool()>& cancelled) {
  if (!config.tie_word_embeddings) return false;
  const auto find = [&](const char* name) { return std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.info.name == name; }); };
  const auto head = find(model::kHeadName), embedding = find(model::kEmbeddingName);
  if (head == tensors.end() || embedding == tensors.end()) return false;
  std::string buffer(kScanBytes, '\0');
  for (const auto& tensor : {head, embedding}) {
    PPFT_RETURN_IF_ERROR(ScanTensor(JoinPath(folder.path(), tensor->file->name), *tensor, buffer, cancelled));
  }
  return head->info.dtype == embedding->info.dtype && head->sha256 != embedding->sha256;
}

// config.json as checked, generation_config.json and the tokenizer's files become blobs.
absl::Status CopyTextFiles(const ModelFolder& folder, const std::vector<std::string>& names, BlobStore& blobs, v1::ModelRecord* record) {
  for (const std::string& name : names) {
    if (!IsModelTextFile(name)) continue;
    if (name == "config.json") {
      PPFT_ASSIGN_OR_RETURN(*record->add_files(), blobs.AddBytes(record->config(), name));
      continue;
    }
    PPFT_ASSIGN_OR_RETURN(const std::string text, ReadText(folder, name, kMaxTextFileBytes));
    PPFT_ASSIGN_OR_RETURN(*record->add_files(), blobs.AddBytes(text, name));
  }
  return absl::OkStatus();
}

void FillSummary(const model::ModelConfig& config, const std::vector<Tensor>& tensors, const ModelFolder& folder, v1::ModelRecord* record) {
  v1::Model* m = record->mutable_model();
  m->set_architecture(config.architecture);
  m->set_num_parameters(model::TotalParameters(config));
  m->set_num_layers(static_cast<int32_t>(config.num_layers));
  m->set_hidden_size(static_cast<int32_t>(config.hidden_size));
  m->set_vocab_size(static_cast<int32_t>(config.vocab_size));
  m->set_max_position_embeddings(static_cast<int32_t>(config.max_position_embeddings));
  m->set_tie_word_embeddings(config.tie_word_embeddings);
  m->set_path(folder.path());
  m->set_config_sha256(Sha256Hex(record->config()));
  m->set_tokenizer_sha256(TokenizerSha256({record->files().begin(), record->files().end()}));
  std::set<std::string> dtypes;
  int64_t size = 0;
  for (const Tensor& tensor : tensors) {
    dtypes.insert(tensor.info.dtype);
    size += tensor.info.size_bytes;
    v1::ModelRecord::Tensor* row = record->add_tensors();
    row->set_file(tensor.file->name);
    row->set_offset(tensor.info.offset);
    v1::TensorRef* ref = row->mutable_tensor();
    ref->set_name(tensor.info.name);
    ref->set_dtype(tensor.info.dtype);
    for (const int64_t dimension : tensor.info.shape) ref->add_shape(dimension);
    ref->mutable_content()->set_name(tensor.info.name);
    ref->mutable_content()->set_sha256(tensor.sha256);
    ref->mutable_content()->set_size_bytes(tensor.info.size_bytes);
  }
  m->set_size_bytes(size);
  m->set_dtype(dtypes.size() == 1 ? *dtypes.begin() : "mixed");
}

}  // namespace

absl::StatusOr<v1::ModelRecord> CheckModel(const ModelFolder& folder, BlobStore& blobs, PrepareRunner& prepare, int threads,
                                           const std::function<bool()>& cancelled) {
  v1::ModelRecord record;
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> names, folder.List());
  const std::string config_path = JoinPath(folder.path(), "config.json");
  absl::StatusOr<std::string> config_text = ReadText(folder, "config.json", kMaxConfigBytes);
  if (absl::IsNotFound(config_text.status()))
    return Invalid(absl::StrCat(config_path, ": is missing; a model folder needs config.json, safetensors files and the tokenizer"));
  PPFT_RETURN_IF_ERROR(config_text.status());
  record.set_config(*config_text);
  PPFT_ASSIGN_OR_RETURN(model::ModelConfig config, model::ParseModelConfig(*config_text, config_path));

  std::map<std::string, std::string> index;
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> weight_names, WeightFileNames(folder, names, &index));
  std::vector<WeightFile> files;
  std::vector<Tensor> tensors;
  PPFT_RETURN_IF_ERROR(ReadHeaders(folder, weight_names, index, &files, &tensors));
  PPFT_ASSIGN_OR_RETURN(const bool head_differs, HeadDiffers(folder, config, tensors, cancelled));
  if (head_differs) {
    PPFT_ASSIGN_OR_RETURN(nlohmann::json untied, model::ParseStrictObject(*config_text, config_path));
    untied["tie_word_embeddings"] = false;
    record.set_config(untied.dump(2));
    config.tie_word_embeddings = false;
  }
  // Before the weights are read: a change in between is seen later.
  for (const WeightFile& file : files) {
    struct stat info;
    if (fstat(file.fd.get(), &info) != 0) return ErrnoStatus(errno, JoinPath(folder.path(), file.name));
    v1::ModelRecord::WeightFile* row = record.add_weight_files();
    row->set_name(file.name);
    row->set_size_bytes(info.st_size);
    row->set_modified_unix_nanos(absl::ToUnixNanos(absl::TimeFromTimespec(info.st_mtim)));
  }
  std::vector<model::TensorInfo> infos;
  for (const Tensor& tensor : tensors) infos.push_back(tensor.info);
  PPFT_RETURN_IF_ERROR(model::CheckInventory(config, infos, folder.path()));
  // What no Llama model reads is neither hashed nor served.
  tensors.erase(std::remove_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return model::IsIgnoredTensor(config, t.info.name); }), tensors.end());

  PPFT_RETURN_IF_ERROR(CopyTextFiles(folder, names, blobs, &record));
  PPFT_ASSIGN_OR_RETURN(const std::string tokenizer_dir, TokenizerDir(blobs, {record.files().begin(), record.files().end()}));
  if (const absl::Status bad = prepare.CheckTokenizer(tokenizer_dir, config.vocab_size, cancelled); !bad.ok()) {
    // It read a private copy; the user knows the model's folder.
    const absl::Status told = WithMessage(bad, absl::StrReplaceAll(bad.message(), {{tokenizer_dir, folder.path()}}));
    return absl::StrContains(told.message(), folder.path()) ? told : Annotate(told, folder.path());
  }
  PPFT_RETURN_IF_ERROR(ScanTensors(folder, tensors, threads, cancelled));
  FillSummary(config, tensors, folder, &record);
  return record;
}

bool SameContent(const v1::ModelRecord& a, const v1::ModelRecord& b) {
  if (a.model().config_sha256() != b.model().config_sha256() || a.model().tokenizer_sha256() != b.model().tokenizer_sha256()) return false;
  const auto contents = [](const v1::ModelRecord& record) {
    std::set<std::pair<std::string, std::string>> out;
    for (const v1::ModelRecord::Tensor& tensor : record.tensors()) out.emplace(tensor.tensor().name(), tensor.tensor().content().sha256());
    return out;
  };
  return contents(a) == contents(b);
}

}  // namespace ppft::coordinator
