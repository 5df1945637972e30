// Following a job to its end: over lost connections, with a bar on a terminal and plain lines elsewhere.
#pragma once

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "clients/ppctl/commands.h"

namespace ppft::ctl {

// Decides what to print for each news of a job. Pure; the time is given.
class ProgressLines {
 public:
  // The plain line to print now, if any: each new state at once, steps at most once a second.
  std::optional<std::string> Next(const v1::Job& job, absl::Time now);

 private:
  v1::JobState state_ = v1::JOB_STATE_UNSPECIFIED;
  std::string line_;
  absl::Time printed_ = absl::InfinitePast();
};

// What to say when the job has ended: for a failure the reason and the remedy, else where to go on.
std::string EndText(const v1::Job& job);

// Returns 0 when the job succeeded, 8 when it failed or was cancelled, 130 after Ctrl-C. The job goes on without us.
Result Follow(Context& context, const std::string& job);

}  // namespace ppft::ctl
