#include "worker/agent/clock_offset.h"

#include <algorithm>
#include <cstdlib>

namespace ppft::agent {

void ClockOffsetEstimate::Add(const v1::ClockAnswer& answer, int64_t now_unix_nanos) {
  const int64_t away = (now_unix_nanos - answer.sent_unix_nanos()) - (answer.answered_unix_nanos() - answer.received_unix_nanos());
  if (answer.sent_unix_nanos() == 0 || away < 0) return;
  v1::ClockOffset sample;
  const int64_t there = answer.received_unix_nanos() - answer.sent_unix_nanos();
  const int64_t back = answer.answered_unix_nanos() - now_unix_nanos;
  sample.set_offset_nanos((there + back) / 2);
  sample.set_error_nanos((away + 1) / 2);
  samples_.push_back(sample);
  if (samples_.size() > kMaxSamples) samples_.pop_front();
}

v1::ClockOffset ClockOffsetEstimate::Get() const {
  v1::ClockOffset best =
      *std::min_element(samples_.begin(), samples_.end(), [](const v1::ClockOffset& a, const v1::ClockOffset& b) { return a.error_nanos() < b.error_nanos(); });
  if (std::llabs(best.offset_nanos()) <= best.error_nanos()) best.set_offset_nanos(0);
  return best;
}

}  // namespace ppft::agent
