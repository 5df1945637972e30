// Which files of a model folder are its tokenizer, and where a private copy of them lies: what was checked at registration is what prepares the
// data and what goes into artifacts, whatever happens to the folder later.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "coordinator/artifacts/blob_store.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

bool IsTokenizerFile(absl::string_view name);
// Files that are copied at registration: config.json, generation_config.json and the tokenizer's.
bool IsModelTextFile(absl::string_view name);

// Over names and contents of the tokenizer files among `files`.
std::string TokenizerSha256(const std::vector<v1::FileRef>& files);

// A folder with exactly the tokenizer files among `files` (hard links to blobs); made when it is not there. Stays.
absl::StatusOr<std::string> TokenizerDir(BlobStore& blobs, const std::vector<v1::FileRef>& files);

}  // namespace ppft::coordinator
