// One interceptor for every call: may the caller do this, how long did it take, how did it end.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/server_interceptor.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/metrics/metrics.h"
#include "ppft/v1/options.pb.h"

namespace ppft::coordinator {

// The role that a method ("/ppft.v1.JobService/GetJob") asks for; ROLE_UNSPECIFIED if it names none or does not exist.
v1::Role RoleOf(const std::string& method);

// True for health and reflection, which carry no role and tell nothing of any tenant.
bool IsOpenToAll(const std::string& method);

// FAILED_PRECONDITION if a method of these services ("ppft.v1.JobService") has no role: the server must not start.
absl::Status CheckRoles(const std::vector<std::string>& services);

// Refuses calls of methods without a role. Roles are not told apart: whoever can connect (on loopback, or by a certificate of the client authority) may call
// everything. Counts and times all calls.
// `metrics` outlives the server.
std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeCallGate(metrics::CoordinatorMetrics* metrics);

}  // namespace ppft::coordinator
