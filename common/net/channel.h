// gRPC channels and servers as every process of the project sets them up: keepalive on both sides, 4 MiB messages, reconnects with backoff,
// never through an HTTP proxy of the environment. EDGE for gRPC's channel arguments.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace ppft::net {

constexpr int kMaxMessageBytes = 4 << 20;
constexpr int kChunkBytes = 1 << 20;  // of file streams

// PEM files for mutual TLS: the authority that signed the other side's certificate, and this side's own certificate and key.
struct TlsFiles {
  std::string ca;
  std::string certificate;
  std::string key;
  bool complete() const { return !ca.empty() && !certificate.empty() && !key.empty(); }
  bool empty() const { return ca.empty() && certificate.empty() && key.empty(); }
};

// Null for no files at all: no encryption. INVALID_ARGUMENT if only some are named (`flag_prefix`, e.g. "--tls_", begins the flags' names in the
// message) or one cannot be read.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> LoadCredentials(const TlsFiles& files, absl::string_view flag_prefix);

struct ChannelOptions {
  std::shared_ptr<grpc::ChannelCredentials> credentials;  // null: without encryption, for loopback
  std::string token;                                      // goes with every call as "authorization: Bearer …"; "": none
  absl::Duration keepalive_time = absl::Seconds(20);
  absl::Duration keepalive_timeout = absl::Seconds(10);
  absl::Duration min_backoff = absl::Milliseconds(200);  // between attempts to connect
  absl::Duration max_backoff = absl::Seconds(5);
};

// A channel to HOST:PORT; connects when first used.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const ChannelOptions& options = {});

// The server's side of the same: message limits, keepalive, and patience with the clients' pings.
void ApplyServerLimits(grpc::ServerBuilder* builder);

// Every call has a deadline.
void SetDeadline(grpc::ClientContext* context, absl::Duration timeout);

// 1.5 x longer after each call of Next, from `first` to `longest`, with jitter of +-20 %. Thread: one at a time.
class Backoff {
 public:
  Backoff(absl::Duration first, absl::Duration longest) : first_(first), longest_(longest), next_(first) {}
  absl::Duration Next();
  void Reset() { next_ = first_; }

 private:
  absl::Duration first_, longest_, next_;
};

}  // namespace ppft::net
