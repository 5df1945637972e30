// Coordinator: the wiring. Opens the store, loads, rebuilds, then serves.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/metrics/metrics.h"
#include "common/net/channel.h"
#include "coordinator/artifacts/artifacts.h"
#include "coordinator/job_controller.h"
#include "coordinator/service/cluster_service.h"
#include "coordinator/service/job_service.h"
#include "coordinator/service/worker_service.h"

namespace ppft::coordinator {

struct CoordinatorOptions {
  std::string version;
  std::string data_dir;
  std::string listen = "127.0.0.1:7070";          // port 0 = any
  std::string metrics_listen = "127.0.0.1:7071";  // port 0 = any
  std::vector<std::string> model_roots;
  std::string prepare_binary;
  net::TlsFiles tls;  // `ca`: callers must show a certificate of this authority
  ControllerOptions controller;
};

// INVALID_ARGUMENT: not HOST:PORT; FAILED_PRECONDITION: other hosts could reach it, and there is no TLS.
absl::Status CheckListen(const std::string& listen, const net::TlsFiles& tls);

class Coordinator {
 public:
  // Serves when it returns. Errors name the flag, folder or port and what to do.
  static absl::StatusOr<std::unique_ptr<Coordinator>> Start(const CoordinatorOptions& options);
  // Ends all calls, then the controller. What was acknowledged is in the store.
  ~Coordinator();

  const std::string& address() const { return address_; }  // HOST:PORT as bound
  const std::string& metrics_address() const { return metrics_http_->address(); }

 private:
  Coordinator() = default;
  absl::Status Serve(const CoordinatorOptions& options);

  // In the order of their making; taken down in reverse.
  std::unique_ptr<metrics::CoordinatorMetrics> metrics_;
  std::unique_ptr<Artifacts> artifacts_;
  std::unique_ptr<JobController> controller_;
  std::unique_ptr<JobServiceImpl> job_service_;
  std::unique_ptr<ClusterServiceImpl> cluster_service_;
  std::unique_ptr<WorkerServiceImpl> worker_service_;
  std::unique_ptr<metrics::HttpServer> metrics_http_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

}  // namespace ppft::coordinator
