// What the main functions of services share.
#pragma once

#include <signal.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace ppft {

// The path of another binary in this one's folder; only `name` where that folder cannot be found.
std::string BesideThisBinary(const std::string& name);

// One line "PROGRAM: message" on stderr. Returns the exit code: 2 for INVALID_ARGUMENT, which is the caller's to change, otherwise 1.
int ReportFailure(absl::string_view program, const absl::Status& status);

sigset_t StopSignals();  // SIGTERM and SIGINT

// Blocks them in this thread and in those that it starts, for sigwait on the set that it returns; writes to a closed connection are errors, not signals.
// Call before any thread starts.
sigset_t BlockStopSignals();

// A process that was told to stop may need seconds for it. Whoever looks at it (ps, deploy/local) sees that it is on its way out: its command name becomes
// "ppft-stopping". From any thread.
void ShowStopping();

}  // namespace ppft
