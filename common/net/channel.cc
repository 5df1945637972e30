#include "common/net/channel.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"

namespace ppft::net {
namespace {

constexpr int64_t kMaxPemBytes = 1 << 20;

int Millis(absl::Duration d) { return static_cast<int>(absl::ToInt64Milliseconds(d)); }

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> LoadCredentials(const TlsFiles& files, absl::string_view flag_prefix) {
  if (files.ca.empty() && files.certificate.empty() && files.key.empty()) return nullptr;
  if (files.ca.empty() || files.certificate.empty() || files.key.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(flag_prefix, "ca, ", flag_prefix, "cert and ", flag_prefix, "key belong together: give all three or none"));
  }
  grpc::SslCredentialsOptions options;
  for (const auto& [path, pem] : {std::make_pair(&files.ca, &options.pem_root_certs), std::make_pair(&files.certificate, &options.pem_cert_chain),
                                  std::make_pair(&files.key, &options.pem_private_key)}) {
    absl::StatusOr<std::string> text = ReadFile(*path, kMaxPemBytes);
    if (!text.ok()) return absl::InvalidArgumentError(text.status().message());
    *pem = *std::move(text);
  }
  return grpc::SslCredentials(options);
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const ChannelOptions& options) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kMaxMessageBytes);
  args.SetMaxSendMessageSize(kMaxMessageBytes);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, Millis(options.keepalive_time));
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, Millis(options.keepalive_timeout));
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 0);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, Millis(options.min_backoff));
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, Millis(std::max(options.min_backoff, absl::Seconds(1))));
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, Millis(options.max_backoff));
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // Channels of one process to one address would share a connection and its backoff; each keeps its own.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address, options.credentials != nullptr ? options.credentials : grpc::InsecureChannelCredentials(), args);
}

void ApplyServerLimits(grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder->SetMaxSendMessageSize(kMaxMessageBytes);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 20000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
}

void SetDeadline(grpc::ClientContext* context, absl::Duration timeout) {
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoNanoseconds(timeout));
}

absl::Duration Backoff::Next() {
  thread_local std::minstd_rand generator(std::random_device{}());
  const double jitter = std::uniform_real_distribution<double>(0.8, 1.2)(generator);
  const absl::Duration now = next_ * jitter;
  next_ = std::min(next_ * 1.5, longest_);
  return now;
}

}  // namespace ppft::net
