#include "coordinator/artifacts/dataset_service.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "coordinator/artifacts/reply.h"
#include "coordinator/artifacts/requests.h"

namespace ppft::coordinator {
namespace {

constexpr int kMaxPreviewRows = 100;

absl::Status CheckDatasetName(const std::string& name) {
  const bool good =
      !name.empty() && name.size() <= 255 && std::none_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == '/'; });
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError("name: must have 1 to 255 characters without '/' and control characters");
}

// A dataset by id, or by a name that only one has.
absl::StatusOr<v1::Dataset> FindDataset(JobStore& store, const std::string& id) {
  absl::StatusOr<v1::Dataset> dataset = store.GetDataset(id);
  if (!absl::IsNotFound(dataset.status())) return dataset;
  PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Dataset> named, store.FindDatasetsByName(id));
  if (named.empty()) return dataset;
  if (named.size() > 1) return absl::FailedPreconditionError(absl::StrCat(named.size(), " datasets have the name \"", id, "\"; use an id"));
  return named[0];
}

grpc::Status NotYet(const char* what) { return Reply(absl::UnimplementedError(absl::StrCat(what, " is not supported in this version"))); }

}  // namespace

grpc::Status DatasetServiceImpl::CreateDataset(grpc::ServerContext*, const v1::CreateDatasetRequest* request, v1::Dataset* response) {
  const auto create = [&]() -> absl::StatusOr<v1::Dataset> {
    PPFT_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
    PPFT_RETURN_IF_ERROR(CheckDatasetName(request->name()));
    const auto size = blobs_->Find(request->sha256());
    if (!size) return absl::FailedPreconditionError(absl::StrCat(request->name(), ": its content ", request->sha256().substr(0, 64), " has not been uploaded"));
    if (*size == 0) return absl::InvalidArgumentError(absl::StrCat(request->name(), ": the file is empty; a dataset needs at least one row"));
    v1::Dataset dataset;
    dataset.set_id(absl::StrCat("ds-", request->sha256().substr(0, 16)));
    dataset.set_name(request->name());
    dataset.set_sha256(request->sha256());
    dataset.set_size_bytes(*size);
    *dataset.mutable_create_time() = google::protobuf::util::TimeUtil::GetCurrentTime();
    return controller_->Run([&, dataset](JobStore& store) -> absl::StatusOr<v1::Dataset> {
      const std::string payload = PayloadSha256(*request);
      PPFT_ASSIGN_OR_RETURN(const auto first, store.FindRequest("CreateDataset", request->request_id(), payload));
      if (first) return store.GetDataset(*first);
      if (!blobs_->Touch(dataset.sha256())) return absl::FailedPreconditionError(absl::StrCat(request->name(), ": its content has gone; upload it again"));
      PPFT_RETURN_IF_ERROR(store.PutBlob({dataset.sha256(), dataset.size_bytes(), absl::Now()}));
      PPFT_RETURN_IF_ERROR(store.PutDataset(dataset));
      PPFT_RETURN_IF_ERROR(store.PutRequest("CreateDataset", request->request_id(), payload, dataset.id()));
      PPFT_ASSIGN_OR_RETURN(const v1::Dataset stored, store.GetDataset(dataset.id()));
      if (stored.sha256() != dataset.sha256()) return absl::InternalError(absl::StrCat("two contents have the id ", dataset.id()));
      return stored;
    });
  };
  return Reply(create(), response);
}

grpc::Status DatasetServiceImpl::GetDataset(grpc::ServerContext*, const v1::GetDatasetRequest* request, v1::Dataset* response) {
  return Reply(controller_->Run([request](JobStore& store) { return FindDataset(store, request->id()); }), response);
}

grpc::Status DatasetServiceImpl::ListDatasets(grpc::ServerContext*, const v1::ListDatasetsRequest* request, v1::ListDatasetsResponse* response) {
  const auto rows = PageRows(request->page_size());
  if (!rows.ok()) return Reply(rows.status());
  auto page = controller_->Run([&](JobStore& store) { return store.ListDatasets({*rows + 1, request->page_token()}); });
  if (!page.ok()) return Reply(page.status());
  if (static_cast<int>(page->size()) > *rows) {
    page->pop_back();
    response->set_next_page_token(page->back().id());
  }
  for (v1::Dataset& dataset : *page) *response->add_datasets() = std::move(dataset);
  return grpc::Status::OK;
}

grpc::Status DatasetServiceImpl::DeleteDataset(grpc::ServerContext*, const v1::DeleteDatasetRequest*, v1::DeleteDatasetResponse*) {
  return NotYet("deleting datasets");
}

grpc::Status DatasetServiceImpl::InspectDataset(grpc::ServerContext*, const v1::InspectDatasetRequest*, v1::InspectDatasetResponse*) {
  return NotYet("inspecting datasets");
}

grpc::Status DatasetServiceImpl::PreviewDataset(grpc::ServerContext* context, const v1::PreviewDatasetRequest* request, v1::PreviewDatasetResponse* response) {
  const auto preview = [&]() -> absl::StatusOr<v1::PreviewDatasetResponse> {
    if (request->num_rows() < 1 || request->num_rows() > kMaxPreviewRows) {
      return absl::InvalidArgumentError(absl::StrCat("num_rows (", request->num_rows(), ") must be from 1 to ", kMaxPreviewRows));
    }
    if (request->data().datasets_size() == 0) return absl::InvalidArgumentError("data.datasets: must name at least one dataset");
    v1::ModelRecord model;
    std::vector<v1::Dataset> datasets;
    PPFT_RETURN_IF_ERROR(controller_->Run([&](JobStore& store) -> absl::Status {
      PPFT_ASSIGN_OR_RETURN(model, store.GetModel(request->base_model()));
      for (const v1::DatasetSpec& spec : request->data().datasets()) {
        PPFT_ASSIGN_OR_RETURN(v1::Dataset dataset, FindDataset(store, spec.path()));
        datasets.push_back(std::move(dataset));
      }
      return absl::OkStatus();
    }));
    return prepare_->Preview(model, request->data(), datasets, request->num_rows(), [context] { return context->IsCancelled(); });
  };
  return Reply(preview(), response);
}

}  // namespace ppft::coordinator
