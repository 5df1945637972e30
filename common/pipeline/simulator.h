// Dry run of rank programs: proves that they are complete, in order and free of deadlock, and predicts time, bubble and memory.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/pipeline/action.h"

namespace ppft::pipeline {

// What a set of programs is to do: `num_microbatches` through `num_stages` stages, forward and (unless forward_only) backward.
struct Work {
  int num_stages = 1;
  int num_microbatches = 1;
  bool forward_only = false;
};

// Checks the programs (one per pipeline rank, stage s on rank s % programs.size()) without running them:
// - every stage does the forward of every micro-batch once and, unless forward_only, then its backward once, on its own rank, and nothing else;
// - every hand-over between ranks has one send behind the action that makes it and one receive before the action that consumes it; none within a rank;
// - on each channel (from rank, to rank, activations or gradients) the k-th send and the k-th receive are the same message.
// FAILED_PRECONDITION with the rank, the action and what is wrong.
absl::Status CheckPrograms(const std::vector<Program>& programs, const Work& work);

inline constexpr int kUnbounded = -1;

struct SimulationOptions {
  std::vector<double> forward_cost;   // per stage; empty: 1 each
  std::vector<double> backward_cost;  // per stage; empty: 1 each
  double send_latency = 0;            // from the send's start to the message's arrival
  // Messages that a channel takes before their receives are posted: 0 = rendezvous (the send waits for its receive), k = the send waits while k messages
  // lie there without a posted receive, kUnbounded = never.
  int channel_capacity = kUnbounded;
  // false: RECV posts and goes on, the consumer waits (what the trainer does). true: RECV itself waits for the message.
  bool blocking_receives = false;
};

// The strictest reading: programs that run under it run under every capacity and with posted receives too, because those only let ranks go on sooner.
SimulationOptions RendezvousOptions();

struct ChannelUse {
  int from = 0;  // pipeline ranks
  int to = 0;
  bool gradients = false;  // else activations
  int num_messages = 0;
  int peak_posted = 0;     // receives posted and not yet consumed at once: the receive buffers needed; follows from the program alone
  int peak_in_flight = 0;  // messages sent and not yet consumed at once, in this timing
};

struct Span {
  double start = 0;
  double end = 0;
};

struct Simulation {
  double makespan = 0;
  double bubble_ratio = 0;                // idle share of all ranks' time, [0, 1)
  std::vector<double> rank_bubble_ratio;  // per pipeline rank
  std::vector<int> peak_activations;      // per pipeline rank: micro-batches times stages between their forward and backward; 0 when forward_only
  std::vector<ChannelUse> channels;       // by sender, activations first; those in use
  std::vector<std::vector<Span>> spans;   // [rank][action]: when it ran (a send until it was accepted)
};

// Runs the programs. First CheckPrograms, whose errors it returns; then FAILED_PRECONDITION "deadlock: ..." naming, for every rank that stands, the
// action and what it waits for. INVALID_ARGUMENT when costs do not match the stages.
absl::StatusOr<Simulation> Simulate(const std::vector<Program>& programs, const Work& work, const SimulationOptions& options);

}  // namespace ppft::pipeline
