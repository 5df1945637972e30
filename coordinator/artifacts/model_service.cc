#include "coordinator/artifacts/model_service.h"

#include <utility>

#include "common/base/status.h"
#include "coordinator/artifacts/reply.h"
#include "coordinator/artifacts/requests.h"

namespace ppft::coordinator {

grpc::Status ModelServiceImpl::RegisterModel(grpc::ServerContext* context, const v1::RegisterModelRequest* request, v1::Model* response) {
  return Reply(models_->Register(*controller_, *request, [context] { return context->IsCancelled(); }), response);
}

grpc::Status ModelServiceImpl::ListModels(grpc::ServerContext*, const v1::ListModelsRequest* request, v1::ListModelsResponse* response) {
  const auto rows = PageRows(request->page_size());
  if (!rows.ok()) return Reply(rows.status());
  auto page = controller_->Run([&](JobStore& store) { return store.ListModels({*rows + 1, request->page_token()}); });
  if (!page.ok()) return Reply(page.status());
  if (static_cast<int>(page->size()) > *rows) {
    page->pop_back();
    response->set_next_page_token(page->back().name());
  }
  for (v1::Model& model : *page) *response->add_models() = std::move(model);
  return grpc::Status::OK;
}

grpc::Status ModelServiceImpl::GetModel(grpc::ServerContext*, const v1::GetModelRequest* request, v1::Model* response) {
  return Reply(controller_->Run([request](JobStore& store) -> absl::StatusOr<v1::Model> {
    PPFT_ASSIGN_OR_RETURN(const v1::ModelRecord record, store.GetModel(request->name()));
    return record.model();
  }),
               response);
}

}  // namespace ppft::coordinator
