// A folder beneath a root that the operator allowed. Every file is opened so that neither ".." nor a link can lead out of the root. EDGE.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/files.h"

namespace ppft::coordinator {

class ModelFolder {
 public:
  // `path` as a user wrote it: absolute, or relative to one of the roots. INVALID_ARGUMENT if it is no folder beneath a root.
  static absl::StatusOr<ModelFolder> Resolve(const std::vector<std::string>& roots, const std::string& path);

  // Names of its files, sorted.
  absl::StatusOr<std::vector<std::string>> List() const;
  // A regular file in it, read-only. NOT_FOUND, or INVALID_ARGUMENT for anything else than a file beneath the root.
  absl::StatusOr<Fd> Open(const std::string& name) const;
  std::string path() const;  // absolute

 private:
  std::string root_;      // canonical
  std::string relative_;  // "." for the root itself
};

}  // namespace ppft::coordinator
