#include "coordinator/artifacts/tokenizer_files.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>

#include "absl/strings/str_cat.h"
#include "common/base/sha256.h"
#include "common/base/status.h"

namespace ppft::coordinator {

bool IsTokenizerFile(absl::string_view name) {
  static constexpr absl::string_view kNames[] = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                                                 "vocab.json",     "merges.txt",      "added_tokens.json",     "chat_template.jinja"};
  return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

bool IsModelTextFile(absl::string_view name) { return name == "config.json" || name == "generation_config.json" || IsTokenizerFile(name); }

std::string TokenizerSha256(const std::vector<v1::FileRef>& files) {
  std::map<std::string, std::string> sorted;
  for (const v1::FileRef& file : files) {
    if (IsTokenizerFile(file.name())) sorted[file.name()] = file.sha256();
  }
  std::string text;
  for (const auto& [name, sha256] : sorted) absl::StrAppend(&text, name, " ", sha256, "\n");
  return Sha256Hex(text);
}

absl::StatusOr<std::string> TokenizerDir(BlobStore& blobs, const std::vector<v1::FileRef>& files) {
  const std::string parent = JoinPath(blobs.data_dir(), "tokenizers");
  const std::string path = JoinPath(parent, TokenizerSha256(files));
  if (PathExists(path)) return path;
  PPFT_RETURN_IF_ERROR(MakeDirs(parent));
  PPFT_ASSIGN_OR_RETURN(const std::string made, blobs.MakeTemporaryDir("tokenizer"));
  for (const v1::FileRef& file : files) {
    if (!IsTokenizerFile(file.name())) continue;
    if (link(blobs.PathOf(file.sha256()).c_str(), JoinPath(made, file.name()).c_str()) != 0) return ErrnoStatus(errno, JoinPath(made, file.name()));
  }
  PPFT_RETURN_IF_ERROR(SyncPath(made));
  const absl::Status renamed = RenameDurably(made, path);
  if (!renamed.ok() && !PathExists(path)) return renamed;  // somebody else was faster: the same content
  PPFT_RETURN_IF_ERROR(RemoveAll(made));
  return path;
}

}  // namespace ppft::coordinator
