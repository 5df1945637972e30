// What every command shares: the terminal, the chosen output format, and the connection to the coordinator with its deadlines and retries.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/net/channel.h"
#include "common/net/transfer.h"
#include "google/protobuf/message.h"
#include "ppft/v1/artifact.grpc.pb.h"
#include "ppft/v1/blob.grpc.pb.h"
#include "ppft/v1/cluster.grpc.pb.h"
#include "ppft/v1/dataset.grpc.pb.h"
#include "ppft/v1/job.grpc.pb.h"
#include "ppft/v1/model.grpc.pb.h"

namespace ppft::ctl {

enum ExitCode {
  kOk = 0,
  kFailure = 1,
  kUsage = 2,
  kNotFound = 3,
  kAuth = 4,
  kUnavailable = 5,
  kDeadline = 6,
  kPrecondition = 7,
  kJobFailed = 8,
  kInterrupted = 130,
};

// The exit code for an error. Local files that the user named wrongly are INVALID_ARGUMENT by then.
int ExitCodeOf(const absl::Status& status);

enum class Format { kTable, kJson, kYaml, kName };

struct Terminal {
  std::ostream* out;
  std::ostream* err;
  bool out_is_terminal = false;
  bool err_is_terminal = false;
  bool color = false;
  size_t width = 100;
};

// Set by Ctrl-C while a job is followed.
std::atomic<bool>& Interrupted();

class Context {
 public:
  explicit Context(Terminal* terminal) : terminal_(terminal) {}

  std::string server = "127.0.0.1:7070";
  net::TlsFiles tls;
  std::string token_file;    // whose first line goes with every call; "": none
  std::string context_name;  // of the config file; "": none was used
  absl::Duration timeout = absl::Seconds(30);
  bool timeout_given = false;
  Format format = Format::kTable;

  std::ostream& out() { return *terminal_->out; }
  std::ostream& err() { return *terminal_->err; }
  const Terminal& terminal() const { return *terminal_; }

  // INVALID_ARGUMENT unless server is HOST:PORT, and for a token that would travel unencrypted. Call before the stubs are used.
  absl::Status Connect();
  v1::JobService::StubInterface* jobs() { return jobs_.get(); }
  v1::DatasetService::StubInterface* datasets() { return datasets_.get(); }
  v1::ModelService::StubInterface* models() { return models_.get(); }
  v1::ArtifactService::StubInterface* artifacts() { return artifacts_.get(); }
  v1::ClusterService::StubInterface* cluster() { return cluster_.get(); }
  v1::BlobService::StubInterface* blobs() { return blobs_.get(); }

  // One unary call within the timeout. A coordinator that was reached before and is away now is tried again with backoff until then; one that was
  // never reached is reported at once. Every request that changes something carries its own request_id, so that repeating is safe.
  template <typename Stub, typename Request, typename Response>
  absl::Status Call(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*), const Request& request, Response* response) {
    return Retry([&](grpc::ClientContext* context) { return (stub->*method)(context, request, response); });
  }
  absl::Status Retry(const std::function<grpc::Status(grpc::ClientContext*)>& call);

  // All pages of a list as one response.
  template <typename Stub, typename Request, typename Response>
  absl::Status CallPages(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*), Request request, Response* all) {
    request.set_page_size(1000);
    do {
      Response page;
      if (absl::Status status = Call(stub, method, request, &page); !status.ok()) return status;
      all->MergeFrom(page);
      request.set_page_token(page.next_page_token());
    } while (!request.page_token().empty());
    all->clear_next_page_token();
    return absl::OkStatus();
  }

  // UNAVAILABLE becomes a sentence with the address and what to do.
  absl::Status Explain(const absl::Status& status) const;
  // Notes that the coordinator has answered.
  void Reached() { reached_ = true; }
  bool reached() const { return reached_; }

  net::TransferOptions Transfers(const std::string& label);
  void EndProgress();  // removes a progress line from the terminal

  // -o json and -o yaml. False for the other formats.
  bool PrintMessage(const google::protobuf::Message& message);
  // The same for data that is no message, given as JSON.
  bool PrintJson(const std::string& json);

  bool ServerIsLoopback() const;

 private:
  Terminal* const terminal_;
  bool reached_ = false;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::JobService::StubInterface> jobs_;
  std::unique_ptr<v1::DatasetService::StubInterface> datasets_;
  std::unique_ptr<v1::ModelService::StubInterface> models_;
  std::unique_ptr<v1::ArtifactService::StubInterface> artifacts_;
  std::unique_ptr<v1::ClusterService::StubInterface> cluster_;
  std::unique_ptr<v1::BlobService::StubInterface> blobs_;
};

// 32 random hex digits.
std::string NewRequestId();

// Proto JSON with snake_case names, enums as names and default values printed; one line unless `pretty`.
std::string ToJson(const google::protobuf::Message& message, bool pretty);
// The same as YAML. A Job's spec is written as the job.yaml that it is.
std::string ToYamlText(const google::protobuf::Message& message);

}  // namespace ppft::ctl
