#include "worker/agent/devices.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/address.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "worker/agent/host_facts.h"

namespace ppft::agent {
namespace {

// /proc/cpuinfo: "model name	: AMD EPYC".
std::string CpuName() {
  const absl::StatusOr<std::string> text = ReadFile("/proc/cpuinfo");
  if (!text.ok()) return "cpu";
  for (absl::string_view line : absl::StrSplit(*text, '\n')) {
    if (absl::StartsWith(line, "model name")) return std::string(absl::StripAsciiWhitespace(line.substr(line.find(':') + 1)));
  }
  return "cpu";
}

}  // namespace

absl::StatusOr<std::vector<v1::Device>> OfferDevices(const std::string& flag, int threads_per_slot) {
  const std::vector<std::string> parts = absl::StrSplit(flag, absl::MaxSplits(':', 1));
  int slots = 0;
  if (parts.size() != 2 || parts[0] != "cpu" || !absl::SimpleAtoi(parts[1], &slots) || slots < 1 || slots > 256) {
    return absl::InvalidArgumentError(absl::StrCat("--devices \"", flag, "\" must be cpu:N with N from 1 to 256, cuda:all, or cuda:0,2"));
  }
  if (threads_per_slot < 0 || threads_per_slot > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("--threads_per_slot (", threads_per_slot, ") must be from 0 (cores / slots) to 1024"));
  }
  std::vector<v1::Device> devices;
  for (int slot = 0; slot < slots; ++slot) {
    v1::Device& device = devices.emplace_back();
    device.set_id(absl::StrCat("cpu:", slot));
    device.set_kind("cpu");
    device.set_name(CpuName());
    device.set_memory_bytes(UsableMemoryBytes() / slots);
    device.set_threads(threads_per_slot > 0 ? threads_per_slot : std::max(1, UsableCores() / slots));
  }
  return devices;
}

absl::StatusOr<std::string> RouteAddress(const std::string& coordinator) {
  PPFT_ASSIGN_OR_RETURN(const Address address, ParseAddress(coordinator, "--coordinator"));
  addrinfo hints = {};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found);
  if (error != 0) return absl::UnavailableError(absl::StrCat("--coordinator ", coordinator, ": ", gai_strerror(error)));
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> holder(found, freeaddrinfo);
  // A connected datagram socket sends nothing; the kernel only chooses the route.
  Fd fd(socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd || connect(fd.get(), found->ai_addr, found->ai_addrlen) != 0) return ErrnoStatus(errno, absl::StrCat("no route to ", coordinator));
  sockaddr_storage local = {};
  socklen_t size = sizeof(local);
  char text[NI_MAXHOST];
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&local), &size) != 0) return ErrnoStatus(errno, "getsockname");
  if (getnameinfo(reinterpret_cast<sockaddr*>(&local), size, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) != 0) {
    return absl::InternalError(absl::StrCat("no numeric address for the route to ", coordinator));
  }
  return std::string(text);
}

std::string MetricsAddress(const std::string& bound, const std::string& address) {
  const absl::StatusOr<Address> parsed = ParseAddress(bound, "--metrics_listen");
  if (!parsed.ok()) return bound;
  in6_addr six;
  const bool every = parsed->host == "0.0.0.0" || (inet_pton(AF_INET6, parsed->host.c_str(), &six) == 1 && IN6_IS_ADDR_UNSPECIFIED(&six));
  return every ? FormatAddress(address, parsed->port) : bound;
}

}  // namespace ppft::agent
