// HOST:PORT as flags, configuration and trainers write it: "127.0.0.1:7070", "gpu-1:7070", "[::1]:7070".
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft {

struct Address {
  std::string host;  // a name, an IPv4 address, or an IPv6 address without its brackets
  int port = 0;
};

// INVALID_ARGUMENT otherwise; `what` begins the message: the flag that the user wrote, such as "--listen". 0 as least_port allows "any port".
absl::StatusOr<Address> ParseAddress(absl::string_view text, absl::string_view what, int least_port = 1);

// The other way; an IPv6 address gets its brackets.
std::string FormatAddress(absl::string_view host, int port);

// "localhost", 127.x.y.z and ::1: reached by processes of this host only. Names are not looked up.
bool IsLoopback(absl::string_view host);

}  // namespace ppft
