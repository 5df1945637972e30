#include "common/net/channel.h"

#include <grpcpp/support/client_interceptor.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"

namespace ppft::net {
namespace {

constexpr int64_t kMaxPemBytes = 1 << 20;

// Not gRPC's own call credentials: those refuse an unencrypted loopback.
class TokenBearer : public grpc::experimental::Interceptor {
 public:
  explicit TokenBearer(const std::string& token) : value_(absl::StrCat("Bearer ", token)) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->insert({"authorization", value_});
    }
    methods->Proceed();
  }

 private:
  const std::string value_;
};

class TokenBearerFactory : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit TokenBearerFactory(std::string token) : token_(std::move(token)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(grpc::experimental::ClientRpcInfo*) override { return new TokenBearer(token_); }

 private:
  const std::string token_;
};

int Millis(absl::Duration d) { return static_cast<int>(absl::ToInt64Milliseconds(d)); }

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> LoadCredentials(const TlsFiles& files, absl::string_view flag_prefix) {
  if (files.empty()) return nullptr;
  if (!files.complete()) {
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
  const std::shared_ptr<grpc::ChannelCredentials> credentials = options.credentials != nullptr ? options.credentials : grpc::InsecureChannelCredentials();
  if (options.token.empty()) return grpc::CreateCustomChannel(address, credentials, args);
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(std::make_unique<TokenBearerFactory>(options.token));
  return grpc::experimental::CreateCustomChannelWithInterceptors(address, credentials, args, std::move(interceptors));
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
