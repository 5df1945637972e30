#include "coordinator/artifacts/model_folder.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"

namespace ppft::coordinator {
namespace {

namespace fs = std::filesystem;

bool IsBeneath(const std::string& root, const std::string& path) { return path == root || absl::StartsWith(path, root == "/" ? root : root + "/"); }

// Opens root/relative; the kernel refuses (EXDEV) what leads out of the root.
int OpenBeneath(const std::string& root, const std::string& relative, int flags) {
  Fd root_fd(open(root.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!root_fd) return -1;
  open_how how = {};
  how.flags = static_cast<__u64>(flags | O_CLOEXEC);
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  const long fd = syscall(SYS_openat2, root_fd.get(), relative.c_str(), &how, sizeof(how));
  if (fd >= 0 || (errno != ENOSYS && errno != EPERM)) return static_cast<int>(fd);
  // Kernels before 5.6 and sandboxes that do not know the call: resolve, then compare.
  std::error_code error;
  const std::string real = fs::canonical(JoinPath(root, relative), error).string();
  if (error) {
    errno = error.value();
    return -1;
  }
  if (!IsBeneath(root, real)) {
    errno = EXDEV;
    return -1;
  }
  return open(real.c_str(), flags | O_CLOEXEC | O_NOFOLLOW);
}

}  // namespace

absl::StatusOr<ModelFolder> ModelFolder::Resolve(const std::vector<std::string>& roots, const std::string& path) {
  std::vector<std::string> known;
  for (const std::string& root : roots) {
    std::error_code error;
    const std::string real_root = fs::canonical(root, error).string();
    if (error) continue;
    known.push_back(real_root);
    if (path.empty() || path.find('\0') != std::string::npos) continue;
    const std::string wanted = fs::weakly_canonical(path[0] == '/' ? fs::path(path) : fs::path(real_root) / path, error).string();
    if (error || !IsBeneath(real_root, wanted)) continue;
    ModelFolder folder;
    folder.root_ = real_root;
    folder.relative_ = wanted.size() > real_root.size() ? wanted.substr(real_root == "/" ? 1 : real_root.size() + 1) : ".";
    const Fd fd(OpenBeneath(folder.root_, folder.relative_, O_RDONLY | O_DIRECTORY));
    if (fd) return folder;
  }
  return absl::InvalidArgumentError(absl::StrCat(path, ": no such folder beneath the coordinator's model roots (",
                                                 known.empty() ? "none is set" : absl::StrJoin(known, ", "),
                                                 "); put the model there, start the coordinator with --model_root, or upload the model"));
}

std::string ModelFolder::path() const { return relative_ == "." ? root_ : JoinPath(root_, relative_); }

absl::StatusOr<std::vector<std::string>> ModelFolder::List() const { return ListDir(path()); }

absl::StatusOr<Fd> ModelFolder::Open(const std::string& name) const {
  Fd fd(OpenBeneath(root_, JoinPath(relative_, name), O_RDONLY | O_NONBLOCK));  // a FIFO must not block
  if (!fd && errno == EXDEV)
    return absl::InvalidArgumentError(absl::StrCat(JoinPath(path(), name), ": leads out of the model root ", root_, "; copy the file there"));
  if (!fd && errno == ELOOP) return absl::InvalidArgumentError(absl::StrCat(JoinPath(path(), name), ": too many links"));
  if (!fd) return ErrnoStatus(errno, JoinPath(path(), name));
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, JoinPath(path(), name));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(JoinPath(path(), name), ": not a regular file"));
  return fd;
}

}  // namespace ppft::coordinator
