// What requests have in common. Idempotency of mutating calls: the same request_id with the same payload answers what the first call made. Pages of lists.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/sha256.h"
#include "coordinator/store/job_store.h"

namespace ppft::coordinator {

// Of the request without its request_id. Messages here have no maps, so the bytes are the same every time.
template <typename Request>
std::string PayloadSha256(Request request) {
  request.clear_request_id();
  return Sha256Hex(request.SerializeAsString());
}

inline absl::Status CheckRequestId(const std::string& id) {
  if (id.empty() || id.size() > 128) return absl::InvalidArgumentError(absl::StrCat("request_id must have 1 to 128 characters, not ", id.size()));
  return absl::OkStatus();
}

// The rows of a page; 0 asks for 100. INVALID_ARGUMENT beyond 1000.
inline absl::StatusOr<int> PageRows(int32_t page_size) {
  constexpr int kDefaultPageRows = 100;
  constexpr int kMaxPageRows = 1000;
  if (page_size < 0 || page_size > kMaxPageRows)
    return absl::InvalidArgumentError(absl::StrCat("page_size (", page_size, ") must be from 0 to ", kMaxPageRows));
  return page_size == 0 ? kDefaultPageRows : page_size;
}

}  // namespace ppft::coordinator
