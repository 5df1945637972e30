// This host's clock against the coordinator's, from the times of heartbeats and their answers, as NTP does it. PURE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "ppft/v1/worker.pb.h"

namespace ppft::agent {

class ClockOffsetEstimate {
 public:
  // `now_unix_nanos`: when the answer came. Answers that cannot be (a clock was set in between) are left out.
  void Add(const v1::ClockAnswer& answer, int64_t now_unix_nanos);
  bool known() const { return !samples_.empty(); }
  // From the quickest of the last answers: a long way may have been long in one direction alone. 0 where the error is as large as the offset.
  v1::ClockOffset Get() const;

 private:
  static constexpr size_t kMaxSamples = 16;  // half a minute: clocks drift

  std::deque<v1::ClockOffset> samples_;
};

}  // namespace ppft::agent
