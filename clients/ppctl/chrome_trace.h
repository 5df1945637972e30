// The ranks' recorded steps as a Chrome trace, which ui.perfetto.dev and chrome://tracing open. Pure.
#pragma once

#include <string>
#include <vector>

#include "ppft/v1/job.pb.h"

namespace ppft::ctl {

// One process per rank with a row for each kind of span, times on the coordinator's clock in microseconds since the first span, an arrow from each send to
// the receive that waited for it.
std::string ChromeTrace(const std::string& job_id, const std::vector<v1::TraceJobResponse>& parts);

// "RANK  STAGES  COMPUTE  SEND …": what share of the traced time each rank spent on what. "" without spans.
std::string TraceSummary(const std::vector<v1::TraceJobResponse>& parts);

}  // namespace ppft::ctl
