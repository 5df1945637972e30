#include "common/pipeline/channel.h"

namespace ppft::pipeline {

Channel ChannelOf(const Action& transfer, int num_ranks) {
  const Action send = IsSend(transfer.op) ? transfer : MatchingSend(transfer);
  return {send.stage % num_ranks, MatchingReceive(send).stage % num_ranks, send.op == Op::kSendBackward};
}

std::optional<Action> ReceiveBefore(const Action& compute, int num_stages) {
  if (compute.op == Op::kForward && compute.stage > 0) return Action{compute.stage, Op::kRecvForward, compute.microbatch};
  if (compute.op == Op::kBackward && compute.stage < num_stages - 1) return Action{compute.stage, Op::kRecvBackward, compute.microbatch};
  return std::nullopt;
}

std::optional<Action> SendAfter(const Action& compute, int num_stages) {
  if (compute.op == Op::kForward && compute.stage < num_stages - 1) return Action{compute.stage, Op::kSendForward, compute.microbatch};
  if (compute.op == Op::kBackward && compute.stage > 0) return Action{compute.stage, Op::kSendBackward, compute.microbatch};
  return std::nullopt;
}

}  // namespace ppft::pipeline
