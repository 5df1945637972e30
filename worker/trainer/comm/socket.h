// Blocking TCP sockets with deadlines. EDGE for the socket calls of the transport.
#pragma once

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/files.h"

namespace ppft::trainer {

absl::StatusOr<std::pair<Fd, std::string>> ListenOn(const std::string& host);  // any port; "HOST:PORT"
// One try. UNAVAILABLE if nobody listens there, DEADLINE_EXCEEDED at the deadline.
absl::StatusOr<Fd> Dial(const std::string& address, absl::Time deadline);
absl::StatusOr<Fd> AcceptUntil(int listener, absl::Time deadline);

// No delay, keep-alive, and an end to a peer whose host is gone.
void TuneSocket(int fd);

// Exactly `size` bytes. UNAVAILABLE("closed") at the end of the stream; `deadline` may be infinite.
absl::Status ReadExactly(int fd, char* data, int64_t size, absl::Time deadline);
absl::Status WriteExactly(int fd, const char* data, int64_t size, absl::Time deadline);

}  // namespace ppft::trainer
