// Inserts sends and receives into compute programs.
//
// How: the compute actions of all ranks are put into one linear order (by the time at which they start when each takes one unit), and each transfer is
// inserted as a pair: directly behind the action that makes the message come the SEND in the sender's program and, in the same breath, the RECV in
// the receiver's program. So the sender places the receive: it is posted while the message is still being computed, and "receive just before use",
// which deadlocks, cannot arise. Neighbouring stages on the same rank (p = 1) hand over without a transfer.
//
// Why this cannot deadlock, even when a send waits for its receive (rendezvous), a receive waits for its message, and all transfers share one order:
// the programs are projections of one linear order in which a transfer's two halves are adjacent. Take the earliest entry of that order that is not
// done. All before it is done, so every rank that takes part stands exactly there: a compute action has its inputs, a transfer has both partners. So it
// completes, and so do all, by induction. Sends that buffer (any capacity k >= 1) and receives that only post let ranks go on sooner and make no one
// wait longer. For the same reason the k-th send and the k-th receive of each channel belong together: the order per channel is well defined.
// Buffers are bounded: a channel never holds more messages than receives posted and not consumed (simulator.h reports the number).
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "common/pipeline/action.h"

namespace ppft::pipeline {

// `compute` holds one program per pipeline rank, forwards and backwards only; stage s must be on rank s % compute.size(). `num_stages` is p * v.
// INVALID_ARGUMENT for a transfer in the input or a stage on the wrong rank; FAILED_PRECONDITION when the order itself cannot run, with the actions
// that wait.
absl::StatusOr<std::vector<Program>> Lower(const std::vector<Program>& compute, int num_stages);

}  // namespace ppft::pipeline
