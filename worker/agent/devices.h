// What this host offers.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "ppft/v1/cluster.pb.h"

namespace ppft::agent {

// `flag` is "cpu:N": N slots that share the host's cores and memory. threads_per_slot 0 = cores / N, at least 1.
// INVALID_ARGUMENT names the flag and what it may be.
absl::StatusOr<std::vector<v1::Device>> OfferDevices(const std::string& flag, int threads_per_slot);

// The local address of the route to `coordinator` (HOST:PORT): where peers of other hosts can reach this one.
absl::StatusOr<std::string> RouteAddress(const std::string& coordinator);

// Where others reach /metrics: `bound` (HOST:PORT), but where that is every address of this host, the port at `address`, by which they reach the trainers.
std::string MetricsAddress(const std::string& bound, const std::string& address);

}  // namespace ppft::agent
