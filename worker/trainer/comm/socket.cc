#include "worker/trainer/comm/socket.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/address.h"
#include "common/base/status.h"

namespace ppft::trainer {
namespace {

absl::Status SocketError(int error, absl::string_view what) { return absl::UnavailableError(absl::StrCat(what, ": ", strerror(error))); }

// Until the descriptor is ready; DEADLINE_EXCEEDED otherwise.
absl::Status PollUntil(int fd, short events, absl::Time deadline) {
  while (true) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) return absl::DeadlineExceededError("no answer in time");
    const int timeout = static_cast<int>(std::min<int64_t>(absl::ToInt64Milliseconds(left) + 1, 60000));
    struct pollfd entry = {fd, events, 0};
    const int ready = poll(&entry, 1, timeout);
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return SocketError(errno, "poll");
  }
}

struct AddressList {
  struct addrinfo* first = nullptr;
  ~AddressList() {
    if (first != nullptr) freeaddrinfo(first);
  }
};

absl::Status Resolve(const std::string& host, const std::string& port, bool passive, AddressList* list) {
  struct addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = passive ? AI_PASSIVE : 0;
  const int rc = getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &list->first);
  if (rc != 0) return absl::UnavailableError(absl::StrCat("cannot resolve \"", host, "\": ", gai_strerror(rc)));
  return absl::OkStatus();
}

absl::StatusOr<std::string> LocalAddress(int fd, const std::string& host) {
  struct sockaddr_storage storage = {};
  socklen_t size = sizeof(storage);
  if (getsockname(fd, reinterpret_cast<struct sockaddr*>(&storage), &size) != 0) return SocketError(errno, "getsockname");
  char name[NI_MAXHOST], port[NI_MAXSERV];
  const int rc = getnameinfo(reinterpret_cast<struct sockaddr*>(&storage), size, name, sizeof(name), port, sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV);
  if (rc != 0) return absl::UnavailableError(absl::StrCat("getnameinfo: ", gai_strerror(rc)));
  int number = 0;
  if (!absl::SimpleAtoi(port, &number)) return absl::InternalError(absl::StrCat("getnameinfo: port ", port));
  return FormatAddress(host.empty() ? name : host, number);
}

}  // namespace

absl::StatusOr<std::pair<Fd, std::string>> ListenOn(const std::string& host) {
  AddressList list;
  PPFT_RETURN_IF_ERROR(Resolve(host, "0", /*passive=*/true, &list));
  absl::Status last = absl::UnavailableError(absl::StrCat("no address for \"", host, "\""));
  for (const struct addrinfo* a = list.first; a != nullptr; a = a->ai_next) {
    Fd fd(socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol));
    if (!fd || bind(fd.get(), a->ai_addr, a->ai_addrlen) != 0 || listen(fd.get(), 128) != 0) {
      last = SocketError(errno, absl::StrCat("listen on ", host));
      continue;
    }
    PPFT_ASSIGN_OR_RETURN(std::string address, LocalAddress(fd.get(), host));
    return std::make_pair(std::move(fd), std::move(address));
  }
  return last;
}

absl::StatusOr<Fd> Dial(const std::string& address, absl::Time deadline) {
  PPFT_ASSIGN_OR_RETURN(const Address peer, ParseAddress(address, "the peer's address"));
  AddressList list;
  PPFT_RETURN_IF_ERROR(Resolve(peer.host, absl::StrCat(peer.port), /*passive=*/false, &list));
  absl::Status last = absl::UnavailableError(absl::StrCat("no address for ", address));
  for (const struct addrinfo* a = list.first; a != nullptr; a = a->ai_next) {
    Fd fd(socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, a->ai_protocol));
    if (!fd) {
      last = SocketError(errno, "socket");
      continue;
    }
    if (connect(fd.get(), a->ai_addr, a->ai_addrlen) != 0) {
      if (errno != EINPROGRESS) {
        last = SocketError(errno, absl::StrCat("connect to ", address));
        continue;
      }
      last = PollUntil(fd.get(), POLLOUT, deadline);
      if (!last.ok()) continue;
      int error = 0;
      socklen_t size = sizeof(error);
      getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) {
        last = SocketError(error, absl::StrCat("connect to ", address));
        continue;
      }
    }
    fcntl(fd.get(), F_SETFL, fcntl(fd.get(), F_GETFL) & ~O_NONBLOCK);
    TuneSocket(fd.get());
    return fd;
  }
  return last;
}

absl::StatusOr<Fd> AcceptUntil(int listener, absl::Time deadline) {
  while (true) {
    PPFT_RETURN_IF_ERROR(PollUntil(listener, POLLIN, deadline));
    Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    if (fd) {
      TuneSocket(fd.get());
      return fd;
    }
    if (errno != EINTR && errno != EAGAIN && errno != ECONNABORTED) return SocketError(errno, "accept");
  }
}

void TuneSocket(int fd) {
  const int one = 1, idle = 10, interval = 5, count = 4;
  const unsigned int user_timeout_ms = 30000;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
  setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &user_timeout_ms, sizeof(user_timeout_ms));
}

absl::Status ReadExactly(int fd, char* data, int64_t size, absl::Time deadline) {
  while (size > 0) {
    if (deadline != absl::InfiniteFuture()) PPFT_RETURN_IF_ERROR(PollUntil(fd, POLLIN, deadline));
    const ssize_t n = recv(fd, data, static_cast<size_t>(size), 0);
    if (n == 0) return absl::UnavailableError("closed");
    if (n < 0) {
      if (errno == EINTR) continue;
      return SocketError(errno, "receive");
    }
    data += n;
    size -= n;
  }
  return absl::OkStatus();
}

absl::Status WriteExactly(int fd, const char* data, int64_t size, absl::Time deadline) {
  while (size > 0) {
    if (deadline != absl::InfiniteFuture()) PPFT_RETURN_IF_ERROR(PollUntil(fd, POLLOUT, deadline));
    const ssize_t n = send(fd, data, static_cast<size_t>(size), MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      return SocketError(errno, "send");
    }
    data += n;
    size -= n;
  }
  return absl::OkStatus();
}

}  // namespace ppft::trainer
