#include "coordinator/artifacts/artifact_service.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "coordinator/artifacts/assembly.h"
#include "coordinator/artifacts/file_streams.h"
#include "coordinator/artifacts/reply.h"
#include "coordinator/artifacts/requests.h"

namespace ppft::coordinator {
namespace {

constexpr int kAllMetricRows = 10'000'000;

absl::Status PutBlobRow(JobStore& store, const v1::FileRef& file) { return store.PutBlob({file.sha256(), file.size_bytes(), absl::Now()}); }

}  // namespace

absl::StatusOr<std::string> ArtifactServiceImpl::JobId(const std::string& id_or_name) {
  if (absl::StartsWith(id_or_name, "adapter-") || absl::StrContains(id_or_name, '@')) return id_or_name;
  PPFT_ASSIGN_OR_RETURN(const v1::Job job, controller_->Run([&](JobStore& store) { return find_job_(store, id_or_name); }));
  return job.id();
}

grpc::Status ArtifactServiceImpl::ListCheckpoints(grpc::ServerContext*, const v1::ListCheckpointsRequest* request, v1::ListCheckpointsResponse* response) {
  const auto job = JobId(request->job_id());
  if (!job.ok()) return Reply(job.status());
  auto list = controller_->Run([&](JobStore& store) { return store.ListCheckpoints(*job); });
  if (!list.ok()) return Reply(list.status());
  for (v1::CheckpointManifest& manifest : *list) *response->add_checkpoints() = std::move(manifest);
  return grpc::Status::OK;
}

grpc::Status ArtifactServiceImpl::ListArtifacts(grpc::ServerContext*, const v1::ListArtifactsRequest* request, v1::ListArtifactsResponse* response) {
  const auto job = JobId(request->job_id());
  if (!job.ok()) return Reply(job.status());
  auto list = controller_->Run([&](JobStore& store) { return store.ListArtifacts(*job); });
  if (!list.ok()) return Reply(list.status());
  for (v1::ArtifactManifest& manifest : *list) *response->add_artifacts() = std::move(manifest);
  return grpc::Status::OK;
}

absl::StatusOr<v1::ArtifactManifest> ArtifactServiceImpl::CheckpointArtifact(const std::string& job_id, const std::string& checkpoint) {
  int64_t step = -1;
  if (checkpoint != "best" && checkpoint != "latest" &&
      (!absl::StartsWith(checkpoint, "step:") || !absl::SimpleAtoi(checkpoint.substr(5), &step) || step < 0)) {
    return absl::InvalidArgumentError(absl::StrCat("checkpoint \"", checkpoint, "\": expected best, latest or step:N"));
  }
  v1::Job job;
  v1::ModelRecord model;
  v1::CheckpointManifest chosen;
  std::vector<v1::MetricRow> rows;
  std::optional<v1::ArtifactManifest> made;
  PPFT_RETURN_IF_ERROR(controller_->Run([&](JobStore& store) -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(job, find_job_(store, job_id));
    PPFT_ASSIGN_OR_RETURN(const std::vector<v1::CheckpointManifest> list, store.ListCheckpoints(job_id));
    bool found = false;
    absl::Status damaged;                             // of the best, unless a newer one is
    for (const v1::CheckpointManifest& one : list) {  // by step: the newest that fits stays
      if (checkpoint == "best" ? !one.best() : checkpoint != "latest" && one.state().step() != step) continue;
      damaged = absl::OkStatus();
      if (!one.damage().empty()) {
        if (checkpoint == "latest") continue;
        damaged = absl::FailedPreconditionError(absl::StrCat(
            "the ", checkpoint == "best" ? "best checkpoint, of step " : "checkpoint of step ", one.state().step(), ", cannot be used: ", one.damage(),
            checkpoint != "best" ? ""
            : found              ? absl::StrCat("; the best one before it is had with --checkpoint step:", chosen.state().step())
                                 : std::string("; no other best one is left")));
        continue;
      }
      chosen = one;
      found = true;
    }
    PPFT_RETURN_IF_ERROR(damaged);
    if (!found) return absl::NotFoundError(absl::StrCat("the job ", job_id, " has no checkpoint \"", checkpoint, "\": see `ppctl checkpoints ", job_id, "`"));
    const auto artifact = store.GetArtifact(absl::StrCat(job_id, "@step-", chosen.state().step()), "adapter");
    if (artifact.ok()) made = *artifact;
    PPFT_ASSIGN_OR_RETURN(model, store.GetModel(job.spec().model().base_model()));
    PPFT_ASSIGN_OR_RETURN(rows, store.ListMetrics(job_id, -1, kAllMetricRows));
    return absl::OkStatus();
  }));
  // An artifact of the same step may stem from an earlier attempt; its bytes are the same, as training is deterministic.
  if (made) return *made;
  PPFT_ASSIGN_OR_RETURN(const v1::ArtifactManifest manifest, AssembleCheckpointAdapter(*blobs_, job, model, chosen, rows));
  return controller_->Run([&](JobStore& store) -> absl::StatusOr<v1::ArtifactManifest> {
    for (const v1::FileRef& file : manifest.files()) PPFT_RETURN_IF_ERROR(PutBlobRow(store, file));
    PPFT_RETURN_IF_ERROR(store.PutArtifact(manifest));
    return manifest;
  });
}

grpc::Status ArtifactServiceImpl::GetManifest(grpc::ServerContext*, const v1::GetManifestRequest* request, v1::ArtifactManifest* response) {
  const auto get = [&]() -> absl::StatusOr<v1::ArtifactManifest> {
    const std::string type = request->type().empty() ? "adapter" : request->type();
    if (type != "adapter" && type != "merged") return absl::InvalidArgumentError(absl::StrCat("type \"", type, "\": expected adapter or merged"));
    PPFT_ASSIGN_OR_RETURN(const std::string id, JobId(request->job_id()));
    if (!request->checkpoint().empty()) {
      if (type != "adapter") return absl::InvalidArgumentError("a checkpoint holds an adapter alone; ask for the type adapter");
      return CheckpointArtifact(id, request->checkpoint());
    }
    return controller_->Run([&](JobStore& store) -> absl::StatusOr<v1::ArtifactManifest> {
      auto manifest = store.GetArtifact(id, type);
      if (!absl::IsNotFound(manifest.status())) return manifest;
      const auto job = find_job_(store, id);
      if (!job.ok()) return manifest;
      if (job->status().state() == v1::JOB_STATE_SUCCEEDED) {
        return absl::NotFoundError(absl::StrCat("the job ", id, " made no artifact of the type ", type, "; output.formats says which ones it makes"));
      }
      PPFT_ASSIGN_OR_RETURN(const std::vector<v1::CheckpointManifest> checkpoints, store.ListCheckpoints(id));
      const bool usable = std::any_of(checkpoints.begin(), checkpoints.end(), [](const v1::CheckpointManifest& one) { return one.damage().empty(); });
      return absl::FailedPreconditionError(absl::StrCat("the job ", id, " has no final model: it is ", v1::JobState_Name(job->status().state()).substr(10),
                                                        usable ? "; a checkpoint can be fetched with --checkpoint latest" : " and has no checkpoint"));
    });
  };
  return Reply(get(), response);
}

grpc::Status ArtifactServiceImpl::Download(grpc::ServerContext* context, const v1::DownloadRequest* request, grpc::ServerWriter<v1::FileChunk>* writer) {
  const auto check = [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::string id, JobId(request->artifact_id()));
    return controller_->Run([&](JobStore& store) -> absl::Status {
      for (const char* type : {"adapter", "merged"}) {
        const auto manifest = store.GetArtifact(id, type);
        if (!manifest.ok()) continue;
        for (const v1::FileRef& file : manifest->files()) {
          if (file.sha256() == request->sha256()) return absl::OkStatus();
        }
      }
      return absl::NotFoundError(absl::StrCat("no file with the content ", request->sha256().substr(0, 64), " in the artifact ", request->artifact_id()));
    });
  };
  absl::Status status = check();
  if (!status.ok()) return Reply(status);
  const auto range = OpenBlobRange(*blobs_, request->sha256());
  if (!range.ok()) return Reply(range.status());
  return Reply(SendRange(*range, request->offset(), context, writer, count_));
}

grpc::Status ArtifactServiceImpl::CreateAdapter(grpc::ServerContext*, const v1::CreateAdapterRequest* request, v1::ArtifactManifest* response) {
  const auto create = [&]() -> absl::StatusOr<v1::ArtifactManifest> {
    PPFT_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
    PPFT_ASSIGN_OR_RETURN(const v1::ArtifactManifest manifest, MakeUploadedAdapter(*blobs_, {request->files().begin(), request->files().end()}));
    return controller_->Run([&](JobStore& store) -> absl::StatusOr<v1::ArtifactManifest> {
      const std::string payload = PayloadSha256(*request);
      PPFT_ASSIGN_OR_RETURN(const auto first, store.FindRequest("CreateAdapter", request->request_id(), payload));
      if (first) return store.GetArtifact(*first, "adapter");
      const auto existing = store.GetArtifact(manifest.id(), "adapter");
      if (!existing.ok()) {
        for (const v1::FileRef& file : manifest.files()) PPFT_RETURN_IF_ERROR(PutBlobRow(store, file));
        PPFT_RETURN_IF_ERROR(store.PutArtifact(manifest));
      }
      PPFT_RETURN_IF_ERROR(store.PutRequest("CreateAdapter", request->request_id(), payload, manifest.id()));
      return existing.ok() ? *existing : manifest;
    });
  };
  return Reply(create(), response);
}

}  // namespace ppft::coordinator
