// What ppft-worker was started for, and what of that this host can give.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "ppft/v1/cluster.pb.h"
#include "worker/agent/agent.h"

namespace ppft::agent {

struct HostOffer {
  std::vector<v1::Device> devices;       // none if the host lacks what trainers need
  std::vector<std::string> environment;  // "NAME=value" for trainers
  std::string torch;
  std::string nccl;
  std::vector<std::string> problems;  // each a sentence: what is missing or too little, and what to do
};

// `devices`: cpu:N, cuda:all or cuda:0,2. What the host lacks is a problem of the offer; only flags that make no sense are INVALID_ARGUMENT.
absl::StatusOr<HostOffer> OfferHost(const std::string& devices, int threads_per_slot, const std::string& trainer);

// Serves until SIGTERM or SIGINT, which the caller has blocked in all threads. Without devices it is connected all the same, so that others see why, and looks
// again every `look_again`.
absl::Status ServeOffer(const AgentOptions& options, HostOffer offer, metrics::WorkerMetrics* metrics, absl::Duration look_again,
                        const std::function<absl::StatusOr<HostOffer>()>& look);

}  // namespace ppft::agent
