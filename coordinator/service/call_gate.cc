#include "coordinator/service/call_gate.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <chrono>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"

namespace ppft::coordinator {
namespace {

constexpr const char* kCodeNames[] = {"OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
                                      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
                                      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
                                      "DATA_LOSS", "UNAUTHENTICATED"};

using grpc::experimental::InterceptionHookPoints;

class CallGate : public grpc::experimental::Interceptor {
 public:
  CallGate(grpc::experimental::ServerRpcInfo* info, metrics::CoordinatorMetrics* metrics)
      : info_(info), metrics_(metrics), allowed_(IsOpenToAll(info->method()) || RoleOf(info->method()) != v1::ROLE_UNSPECIFIED) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA) && !allowed_) info_->server_context()->TryCancel();
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      if (!allowed_) methods->ModifySendStatus(grpc::Status(grpc::StatusCode::PERMISSION_DENIED, absl::StrCat(info_->method(), " has no role")));
      const int code = methods->GetSendStatus().error_code();
      const absl::Duration took = absl::FromChrono(std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin_));
      metrics_->CountRpc(Label(), code >= 0 && code <= 16 ? kCodeNames[code] : "UNKNOWN", took);
    }
    methods->Proceed();
  }

 private:
  // Only methods that exist: a caller must not be able to make series.
  std::string Label() const { return allowed_ ? std::string(absl::StripPrefix(info_->method(), "/")) : "unknown"; }

  grpc::experimental::ServerRpcInfo* const info_;
  metrics::CoordinatorMetrics* const metrics_;
  const bool allowed_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

class CallGateFactory : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit CallGateFactory(metrics::CoordinatorMetrics* metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) override { return new CallGate(info, metrics_); }

 private:
  metrics::CoordinatorMetrics* const metrics_;
};

}  // namespace

v1::Role RoleOf(const std::string& method) {
  const std::string name = absl::StrReplaceAll(absl::StripPrefix(method, "/"), {{"/", "."}});
  const auto* descriptor = google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(name);
  return descriptor == nullptr ? v1::ROLE_UNSPECIFIED : descriptor->options().GetExtension(v1::role);
}

bool IsOpenToAll(const std::string& method) {
  return absl::StartsWith(method, "/grpc.health.v1.Health/") || absl::StartsWith(method, "/grpc.reflection.v1alpha.ServerReflection/");
}

absl::Status CheckRoles(const std::vector<std::string>& services) {
  for (const std::string& name : services) {
    const auto* service = google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(name);
    if (service == nullptr) return absl::FailedPreconditionError(absl::StrCat("no service ", name));
    for (int i = 0; i < service->method_count(); ++i) {
      const std::string method = absl::StrCat("/", name, "/", service->method(i)->name());
      if (RoleOf(method) == v1::ROLE_UNSPECIFIED) return absl::FailedPreconditionError(absl::StrCat(method, " has no role option"));
    }
  }
  return absl::OkStatus();
}

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeCallGate(metrics::CoordinatorMetrics* metrics) {
  return std::make_unique<CallGateFactory>(metrics);
}

}  // namespace ppft::coordinator
