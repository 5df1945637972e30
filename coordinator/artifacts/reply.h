// How a handler of this room answers: a status of ours as one of gRPC's.
#pragma once

#include <grpcpp/grpcpp.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/net/status.h"

namespace ppft::coordinator {

inline grpc::Status Reply(const absl::Status& status) { return net::ToGrpcStatus(status); }

// Fills `response` if `result` is OK.
template <typename T>
grpc::Status Reply(absl::StatusOr<T> result, T* response) {
  if (result.ok()) *response = *std::move(result);
  return net::ToGrpcStatus(result.status());
}

}  // namespace ppft::coordinator
