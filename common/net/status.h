// absl::Status <-> grpc::Status. Payloads of an absl::Status whose key is "type.googleapis.com/…" travel as the details of a google.rpc.Status, so
// that any gRPC client can read them; the two detail types that the project uses are written here.
#pragma once

#include <grpcpp/support/status.h>

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace ppft::net {

grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status StatusFromGrpc(const grpc::Status& status);

// google.rpc.ErrorInfo: one per error. `reason` is a stable word: STALE_EPOCH, DATASET_INVALID, ….
struct ErrorInfo {
  std::string reason;
  std::map<std::string, std::string> metadata;
};
void SetErrorInfo(absl::Status* status, const ErrorInfo& info);
ErrorInfo GetErrorInfo(const absl::Status& status);  // empty if there is none

// google.rpc.BadRequest: the wrong fields of a request.
struct FieldViolation {
  std::string field;  // "adapter.r"
  std::string description;
};
void SetFieldViolations(absl::Status* status, const std::vector<FieldViolation>& violations);

// UNAVAILABLE, DEADLINE_EXCEEDED and ABORTED may be tried again.
bool IsRetryable(const absl::Status& status);

}  // namespace ppft::net
