// How a unary callback answers: what it needs is posted to the controller or done on the pool, and the call ends with the status of that.
#pragma once

#include <grpcpp/grpcpp.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/net/status.h"
#include "coordinator/controller.h"

namespace ppft::coordinator {

// `body` runs on the controller's thread, in its transaction; the call ends after the commit. Request and response live until then.
inline grpc::ServerUnaryReactor* AnswerAfterCommit(grpc::CallbackServerContext* context, Controller* controller, Controller::Body body) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  controller->Post(std::move(body), [reactor](absl::Status status) { reactor->Finish(net::ToGrpcStatus(status)); });
  return reactor;
}

// `work` runs on the pool and may block.
inline grpc::ServerUnaryReactor* AnswerFromPool(grpc::CallbackServerContext* context, Controller* controller, absl::AnyInvocable<absl::Status()> work) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  controller->Work([reactor, work = std::move(work)]() mutable { reactor->Finish(net::ToGrpcStatus(work())); });
  return reactor;
}

// For a method that later versions will have.
inline grpc::ServerUnaryReactor* AnswerNotYet(grpc::CallbackServerContext* context, absl::string_view what) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status(grpc::StatusCode::UNIMPLEMENTED, absl::StrCat(what, " is not supported in this version")));
  return reactor;
}

}  // namespace ppft::coordinator
