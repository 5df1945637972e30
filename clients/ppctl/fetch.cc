// fetch: an artifact's files into a folder. Everything lands in FOLDER.partial first, file by file with resume and SHA-256; the finished folder is
// put in place by one rename.
#include <fcntl.h>
#include <sys/file.h>

#include <cerrno>
#include <filesystem>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/format.h"
#include "common/base/files.h"
#include "common/base/format.h"
#include "common/base/status.h"
#include "common/spec/suggest.h"

namespace ppft::ctl {
namespace {

namespace fs = std::filesystem;

constexpr char kLock[] = ".lock";
constexpr char kManifest[] = "manifest.json";

absl::Status CheckOptions(const FetchOptions& options) {
  if (options.type != "adapter" && options.type != "merged")
    return absl::InvalidArgumentError(absl::StrCat("--type ", options.type, " is not known", spec::UseOneOf(options.type, {"adapter", "merged"})));
  int64_t step;
  const std::string& checkpoint = options.checkpoint;
  const bool numbered = absl::StartsWith(checkpoint, "step:") && absl::SimpleAtoi(checkpoint.substr(5), &step) && step >= 0;
  if (!checkpoint.empty() && checkpoint != "best" && checkpoint != "latest" && !numbered) {
    return absl::InvalidArgumentError(absl::StrCat("--checkpoint ", checkpoint, " is not known", spec::UseOneOf(checkpoint, {"best", "latest", "step:N"}),
                                                   " (ppctl checkpoints lists them)"));
  }
  return absl::OkStatus();
}

// What is there may be replaced: nothing, an empty folder, or with --force the result of an earlier fetch.
absl::Status CheckTarget(const fs::path& target, bool force) {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(target, error))) return absl::OkStatus();
  const bool real_folder = fs::is_directory(fs::symlink_status(target, error));
  if (real_folder && fs::is_empty(target, error) && !error) return absl::OkStatus();
  if (!force) return absl::FailedPreconditionError(absl::StrCat(target.string(), " exists: choose another folder with -o, or replace it with --force"));
  const bool fetched = real_folder && (fs::exists(target / "trainer_state.json", error) || fs::exists(target / "adapter_config.json", error));
  if (!fetched)
    return absl::FailedPreconditionError(
        absl::StrCat(target.string(), " is not a fetched model: --force replaces only those; remove it yourself or choose another with -o"));
  return absl::OkStatus();
}

// A manifest comes from outside: its names must stay in the folder.
absl::Status CheckManifest(const v1::ArtifactManifest& manifest) {
  std::set<std::string> names;
  if (manifest.files().empty()) return absl::DataLossError(absl::StrCat("the manifest of ", manifest.id(), " lists no files"));
  for (const v1::FileRef& file : manifest.files()) {
    const std::string& name = file.name();
    if (name.empty() || name[0] == '.' || absl::StrContains(name, '/') || absl::StrContains(name, '\0') || name == kManifest || name.size() > 200 ||
        !names.insert(name).second) {
      return absl::DataLossError(absl::StrCat("the manifest of ", manifest.id(), " names a file that cannot be: \"", Printable(name), "\""));
    }
  }
  return absl::OkStatus();
}

// Local trouble while writing is a failure, not a matter of authentication or of a wrong id.
absl::Status AsLocal(const absl::Status& status) { return status.ok() ? status : absl::InternalError(status.message()); }

absl::StatusOr<Fd> LockFolder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) return absl::InternalError(absl::StrCat(folder.string(), ": ", error.message()));
  Fd lock(::open((folder / kLock).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!lock) return AsLocal(ErrnoStatus(errno, (folder / kLock).string()));
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0)
    return absl::FailedPreconditionError(absl::StrCat(folder.string(), ": another ppctl fetch is writing there"));
  return lock;
}

absl::Status RemoveOthers(const fs::path& folder, const v1::ArtifactManifest& manifest) {
  std::set<std::string> wanted;
  for (const v1::FileRef& file : manifest.files()) wanted.insert(file.name());
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDir(folder.string()));
  for (const std::string& name : names) {
    if (wanted.count(name) == 0) PPFT_RETURN_IF_ERROR(RemoveAll((folder / name).string()));
  }
  return absl::OkStatus();
}

absl::Status PutInPlace(const fs::path& partial, const fs::path& target, bool force) {
  PPFT_RETURN_IF_ERROR(CheckTarget(target, force));
  std::error_code error;
  const fs::path old = target.string() + ".replaced";
  const bool replaces = fs::exists(target, error) && !fs::is_empty(target, error);
  if (replaces) {
    PPFT_RETURN_IF_ERROR(AsLocal(RemoveAll(old.string())));
    PPFT_RETURN_IF_ERROR(AsLocal(RenameDurably(target.string(), old.string())));
  }
  PPFT_RETURN_IF_ERROR(AsLocal(RenameDurably(partial.string(), target.string())));
  return replaces ? AsLocal(RemoveAll(old.string())) : absl::OkStatus();
}

absl::Status Download(Context& context, const v1::ArtifactManifest& manifest, const fs::path& folder) {
  for (const v1::FileRef& file : manifest.files()) {
    const auto open = [&](grpc::ClientContext* call, int64_t offset) {
      v1::DownloadRequest request;
      request.set_sha256(file.sha256());
      request.set_offset(offset);
      request.set_artifact_id(manifest.id());
      return context.artifacts()->Download(call, request);
    };
    const absl::Status status = net::DownloadFile(open, file, (folder / file.name()).string(), context.Transfers(absl::StrCat("fetching ", file.name())));
    context.EndProgress();
    PPFT_RETURN_IF_ERROR(context.Explain(status));
  }
  return absl::OkStatus();
}

}  // namespace

Result Fetch(Context& context, const FetchOptions& options) {
  PPFT_RETURN_IF_ERROR(CheckOptions(options));
  std::string name = options.folder;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  const fs::path target = fs::absolute(name).lexically_normal();
  if (!target.has_filename()) return absl::InvalidArgumentError(absl::StrCat(options.folder, " is not a folder that can be made: name one with -o"));
  PPFT_RETURN_IF_ERROR(CheckTarget(target, options.force));
  v1::GetJobRequest find;
  find.set_id(options.job);
  v1::Job job;
  PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::GetJob, find, &job));
  v1::GetManifestRequest request;
  request.set_job_id(job.id());
  request.set_type(options.type);
  request.set_checkpoint(options.checkpoint);
  v1::ArtifactManifest manifest;
  PPFT_RETURN_IF_ERROR(context.Call(context.artifacts(), &v1::ArtifactService::StubInterface::GetManifest, request, &manifest));
  PPFT_RETURN_IF_ERROR(CheckManifest(manifest));

  const fs::path partial = target.string() + ".partial";
  PPFT_ASSIGN_OR_RETURN(const Fd lock, LockFolder(partial));
  PPFT_RETURN_IF_ERROR(Download(context, manifest, partial));
  PPFT_RETURN_IF_ERROR(AsLocal(RemoveOthers(partial, manifest)));
  // What was fetched, with the checksums and the measured verification, for whoever gets the folder.
  PPFT_RETURN_IF_ERROR(AsLocal(WriteFileAtomic((partial / kManifest).string(), ToJson(manifest, /*pretty=*/true))));
  std::error_code error;
  fs::permissions(partial / kManifest, fs::status(partial / manifest.files(0).name(), error).permissions(), error);  // as those that were fetched
  if (error) return absl::InternalError(absl::StrCat((partial / kManifest).string(), ": ", error.message()));
  PPFT_RETURN_IF_ERROR(PutInPlace(partial, target, options.force));
  int64_t bytes = 0;
  for (const v1::FileRef& file : manifest.files()) bytes += file.size_bytes();
  if (!context.PrintMessage(manifest)) context.out() << options.folder << "\n";
  context.err() << Counted(manifest.files_size(), "file") << ", " << FormatBytes(bytes) << ", step " << manifest.step() << ", SHA-256 of each checked\n";
  return kOk;
}

}  // namespace ppft::ctl
