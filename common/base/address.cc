#include "common/base/address.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <cstdint>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace ppft {
namespace {

constexpr int kMostPort = 65535;

}  // namespace

absl::StatusOr<Address> ParseAddress(absl::string_view text, absl::string_view what, int least_port) {
  const auto bad = [&] { return absl::InvalidArgumentError(absl::StrCat(what, " \"", text, "\" is not HOST:PORT, such as 127.0.0.1:7070 or [::1]:7070")); };
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return bad();
  const absl::string_view digits = text.substr(colon + 1);
  absl::string_view host = text.substr(0, colon);
  Address address;
  // SimpleAtoi alone would take blanks and a sign.
  if (digits.empty() || !absl::ascii_isdigit(digits.front()) || !absl::ascii_isdigit(digits.back()) || !absl::SimpleAtoi(digits, &address.port)) return bad();
  if (address.port < least_port || address.port > kMostPort) return bad();
  if (absl::StartsWith(host, "[") && absl::EndsWith(host, "]")) {
    host = host.substr(1, host.size() - 2);
  } else if (absl::StrContains(host, ":")) {
    return bad();
  }
  if (host.empty()) return bad();
  address.host = std::string(host);
  return address;
}

std::string FormatAddress(absl::string_view host, int port) {
  return absl::StrContains(host, ":") ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

bool IsLoopback(absl::string_view host) {
  const std::string text(host);
  in_addr four;
  if (inet_pton(AF_INET, text.c_str(), &four) == 1) return (ntohl(four.s_addr) >> 24) == 127;
  in6_addr six;
  if (inet_pton(AF_INET6, text.c_str(), &six) == 1) return IN6_IS_ADDR_LOOPBACK(&six);
  return text == "localhost";
}

}  // namespace ppft
