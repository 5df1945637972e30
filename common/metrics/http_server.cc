#include <civetweb.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/address.h"
#include "common/base/status.h"
#include "common/metrics/metrics.h"

namespace ppft::metrics {

struct HttpServer::Impl {
  std::shared_ptr<prometheus::Registry> registry;
  std::function<std::string()> service_discovery;
  Address bound;
  std::string address;  // the same as text
  mg_context* context = nullptr;
};

namespace {

int Respond(mg_connection* connection, absl::string_view type, const std::string& body) {
  const std::string head = absl::StrCat("HTTP/1.1 200 OK\r\nContent-Type: ", type, "\r\nContent-Length: ", body.size(), "\r\nConnection: close\r\n\r\n");
  mg_write(connection, head.data(), head.size());
  mg_write(connection, body.data(), body.size());
  return 200;
}

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& listen, std::shared_ptr<prometheus::Registry> registry,
                                                              std::function<std::string()> service_discovery) {
  PPFT_ASSIGN_OR_RETURN(Address address, ParseAddress(listen, "--metrics_listen", /*least_port=*/0));
  static std::once_flag library;
  std::call_once(library, [] { mg_init_library(0); });
  auto impl = std::make_unique<Impl>();
  impl->registry = std::move(registry);
  impl->service_discovery = std::move(service_discovery);
  const char* options[] = {"listening_ports", listen.c_str(), "num_threads", "2", nullptr};
  mg_callbacks callbacks = {};
  callbacks.log_message = [](const mg_connection*, const char*) { return 1; };  // failures are in the returned Status
  impl->context = mg_start(&callbacks, nullptr, options);
  if (impl->context == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen for metrics on ", listen, ": the port is in use or the address is not of this host; choose another --metrics_listen"));
  }
  mg_server_port bound[4] = {};
  const int count = mg_get_server_ports(impl->context, 4, bound);
  if (count > 0) address.port = bound[0].port;
  impl->bound = std::move(address);
  impl->address = FormatAddress(impl->bound.host, impl->bound.port);
  mg_set_request_handler(
      impl->context, "/metrics$",
      [](mg_connection* connection, void* data) {
        return Respond(connection, "text/plain; version=0.0.4; charset=utf-8",
                       prometheus::TextSerializer().Serialize(static_cast<Impl*>(data)->registry->Collect()));
      },
      impl.get());
  if (impl->service_discovery) {
    mg_set_request_handler(
        impl->context, "/sd$",
        [](mg_connection* connection, void* data) { return Respond(connection, "application/json", static_cast<Impl*>(data)->service_discovery()); },
        impl.get());
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() {
  // The accepting thread looks every two seconds whether it should end; a connection wakes it.
  std::atomic<bool> stopped = false;
  std::thread knock([&] {
    while (!stopped) {
      char error[128];
      mg_connection* const connection = mg_connect_client(impl_->bound.host.c_str(), impl_->bound.port, 0, error, sizeof(error));
      if (connection != nullptr) mg_close_connection(connection);
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  });
  mg_stop(impl_->context);
  stopped = true;
  knock.join();
}

const std::string& HttpServer::address() const { return impl_->address; }

}  // namespace ppft::metrics
