#include "worker/agent/host_facts.h"

#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"

namespace ppft::agent {
namespace {

// The interface that has this numeric address; "" for a name or an address of another machine.
std::string InterfaceOf(const std::string& address) {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return "";
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> holder(list, freeifaddrs);
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr) continue;
    const int family = entry->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    char text[NI_MAXHOST];
    const socklen_t size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    if (getnameinfo(entry->ifa_addr, size, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) == 0 && address == text) return entry->ifa_name;
  }
  return "";
}

// 0 where the kernel does not say: virtual interfaces, and those that are down.
int LinkMbits(const std::string& interface) {
  const absl::StatusOr<std::string> text = ReadFile(absl::StrCat("/sys/class/net/", interface, "/speed"));
  int mbits = 0;
  return text.ok() && absl::SimpleAtoi(absl::StripAsciiWhitespace(*text), &mbits) ? std::max(0, mbits) : 0;
}

}  // namespace

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
  return std::max(1, CPU_COUNT(&set));
}

// The smaller of the host's memory and the control group's limit.
int64_t UsableMemoryBytes() {
  int64_t bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  int64_t limit = 0;
  const absl::StatusOr<std::string> text = ReadFile("/sys/fs/cgroup/memory.max");
  if (text.ok() && absl::SimpleAtoi(absl::StripAsciiWhitespace(*text), &limit)) bytes = std::min(bytes, limit);
  return bytes;
}

v1::HostFacts GatherHostFacts(const std::string& address) {
  v1::HostFacts facts;
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) == 0) facts.set_hostname(name);
  facts.set_network_interface(InterfaceOf(address));
  if (!facts.network_interface().empty()) facts.set_link_mbits(LinkMbits(facts.network_interface()));
  facts.set_cores(UsableCores());
  facts.set_memory_bytes(UsableMemoryBytes());
  return facts;
}

std::string NameOfFolder(const std::string& hostname, const std::string& work_directory) {
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::weakly_canonical(work_directory, error);
  return absl::StrCat(hostname.substr(0, 56), "-", Sha256Hex(error ? work_directory : folder.string()).substr(0, 6));
}

int64_t DiskFreeBytes(const std::string& folder) {
  struct statvfs disk;
  return statvfs(folder.c_str(), &disk) == 0 ? static_cast<int64_t>(disk.f_bavail) * static_cast<int64_t>(disk.f_frsize) : 0;
}

}  // namespace ppft::agent
