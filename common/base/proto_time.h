// Protobuf's times as absl's, and back. A header alone: only those who have protobuf anyway include it.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/timestamp.pb.h"

namespace ppft {

inline absl::Duration ToDuration(const google::protobuf::Duration& duration) { return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos()); }

inline absl::Time ToTime(const google::protobuf::Timestamp& time) { return absl::FromUnixSeconds(time.seconds()) + absl::Nanoseconds(time.nanos()); }

inline void SetTime(absl::Time time, google::protobuf::Timestamp* out) {
  const int64_t seconds = absl::ToUnixSeconds(time);  // rounds down
  out->set_seconds(seconds);
  out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(time - absl::FromUnixSeconds(seconds))));
}

}  // namespace ppft
