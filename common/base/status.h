// Status macros. absl::Status is the project's only error channel: INVALID_ARGUMENT for what the user must change, FAILED_PRECONDITION for a
// state that forbids it, DATA_LOSS for damaged bytes; UNAVAILABLE, DEADLINE_EXCEEDED and ABORTED may be tried again.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft {

// The same code with `context: ` before the message; payloads are kept. OK stays OK.
absl::Status Annotate(const absl::Status& status, absl::string_view context);

// The same code and payloads with another message. OK stays OK.
absl::Status WithMessage(const absl::Status& status, absl::string_view message);

// FROM errno: ENOSPC -> RESOURCE_EXHAUSTED, ENOENT -> NOT_FOUND, EACCES/EROFS -> PERMISSION_DENIED, else INTERNAL. "what: No space left on device".
absl::Status ErrnoStatus(int error, absl::string_view what);

}  // namespace ppft

#define PPFT_CONCAT_INNER(a, b) a##b
#define PPFT_CONCAT(a, b) PPFT_CONCAT_INNER(a, b)

#define PPFT_RETURN_IF_ERROR(expr)               \
  do {                                           \
    ::absl::Status ppft_status_ = (expr);        \
    if (!ppft_status_.ok()) return ppft_status_; \
  } while (false)

#define PPFT_ASSIGN_OR_RETURN(lhs, expr) PPFT_ASSIGN_OR_RETURN_INNER(PPFT_CONCAT(ppft_or_, __LINE__), lhs, expr)
#define PPFT_ASSIGN_OR_RETURN_INNER(var, lhs, expr) \
  auto var = (expr);                                \
  if (!var.ok()) return var.status();               \
  lhs = std::move(var).value()
