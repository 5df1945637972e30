// What a rank does in which order. A program is a list of actions; the trainer's interpreter executes it as it stands.
//
// Text: stage, operation, micro-batch without blanks: "2F0" is stage 2, forward, micro-batch 0. Operations: F B SEND_F RECV_F SEND_B RECV_B.
// Actions of a program are separated by blanks.
//
// A transfer is named by the stage that executes it:
//   sSEND_Fm  stage s sends its output to stage s + 1          sRECV_Fm  stage s receives its input from stage s - 1
//   sSEND_Bm  stage s sends its input's gradient to stage s - 1  sRECV_Bm  stage s receives its output's gradient from stage s + 1
// so 1SEND_F0 is matched by 2RECV_F0, and 2SEND_B0 by 1RECV_B0.
//
// RECV posts a receive and does not wait; the F or B that consumes the message waits for it. SEND may return before the message has left. Between
// two ranks the messages of one direction and one kind (activations, gradients) arrive in the order in which they were sent.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft::pipeline {

enum class Op { kForward, kBackward, kSendForward, kRecvForward, kSendBackward, kRecvBackward };

struct Action {
  int stage = 0;
  Op op = Op::kForward;
  int microbatch = 0;  // index in the step, of this replica

  friend bool operator==(const Action&, const Action&) = default;
  friend bool operator<(const Action& a, const Action& b) { return std::tie(a.stage, a.op, a.microbatch) < std::tie(b.stage, b.op, b.microbatch); }
};

// One rank's actions in order.
using Program = std::vector<Action>;

bool IsCompute(Op op);  // forward or backward
bool IsSend(Op op);
bool IsReceive(Op op);

// The receive that takes what `send` sends. `send.op` must be a send.
Action MatchingReceive(const Action& send);
// The send that fills `receive`. `receive.op` must be a receive.
Action MatchingSend(const Action& receive);

std::string ToString(const Action& action);
// INVALID_ARGUMENT with the text that is no action.
absl::StatusOr<Action> ParseAction(absl::string_view text);
// Actions separated by any white space; the empty text is the empty program. INVALID_ARGUMENT with the position (from 0) of the first bad action.
absl::StatusOr<Program> ParseProgram(absl::string_view text);
std::string FormatProgram(const Program& program);

}  // namespace ppft::pipeline
