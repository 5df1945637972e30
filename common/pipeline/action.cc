#include "common/pipeline/action.h"

#include <cassert>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace ppft::pipeline {
namespace {

struct OpName {
  Op op;
  const char* text;
};
constexpr OpName kOpNames[] = {{Op::kForward, "F"},          {Op::kBackward, "B"},          {Op::kSendForward, "SEND_F"},
                               {Op::kRecvForward, "RECV_F"}, {Op::kSendBackward, "SEND_B"}, {Op::kRecvBackward, "RECV_B"}};

absl::string_view NameOf(Op op) {
  for (const OpName& name : kOpNames) {
    if (name.op == op) return name.text;
  }
  return "?";
}

// Decimal digits alone: absl::SimpleAtoi would also take signs and blanks.
bool ParseIndex(absl::string_view text, int* value) {
  if (text.empty()) return false;
  for (char c : text) {
    if (!absl::ascii_isdigit(static_cast<unsigned char>(c))) return false;
  }
  return absl::SimpleAtoi(text, value);
}

}  // namespace

bool IsCompute(Op op) { return op == Op::kForward || op == Op::kBackward; }
bool IsSend(Op op) { return op == Op::kSendForward || op == Op::kSendBackward; }
bool IsReceive(Op op) { return op == Op::kRecvForward || op == Op::kRecvBackward; }

Action MatchingReceive(const Action& send) {
  assert(IsSend(send.op));
  if (send.op == Op::kSendForward) return {send.stage + 1, Op::kRecvForward, send.microbatch};
  return {send.stage - 1, Op::kRecvBackward, send.microbatch};
}

Action MatchingSend(const Action& receive) {
  assert(IsReceive(receive.op));
  if (receive.op == Op::kRecvForward) return {receive.stage - 1, Op::kSendForward, receive.microbatch};
  return {receive.stage + 1, Op::kSendBackward, receive.microbatch};
}

std::string ToString(const Action& action) { return absl::StrCat(action.stage, NameOf(action.op), action.microbatch); }

absl::StatusOr<Action> ParseAction(absl::string_view text) {
  size_t begin = 0;
  while (begin < text.size() && absl::ascii_isdigit(static_cast<unsigned char>(text[begin]))) ++begin;
  size_t end = text.size();
  while (end > begin && absl::ascii_isdigit(static_cast<unsigned char>(text[end - 1]))) --end;
  Action action;
  const absl::string_view op = text.substr(begin, end - begin);
  bool known = false;
  for (const OpName& name : kOpNames) {
    if (op == name.text) {
      action.op = name.op;
      known = true;
    }
  }
  if (!known || !ParseIndex(text.substr(0, begin), &action.stage) || !ParseIndex(text.substr(end), &action.microbatch)) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text, "\" is no action: expected stage, one of F B SEND_F RECV_F SEND_B RECV_B, micro-batch, as in 2F0"));
  }
  return action;
}

absl::StatusOr<Program> ParseProgram(absl::string_view text) {
  Program program;
  for (absl::string_view word : absl::StrSplit(text, absl::ByAnyChar(" \t\r\n"), absl::SkipEmpty())) {
    absl::StatusOr<Action> action = ParseAction(word);
    if (!action.ok()) return absl::InvalidArgumentError(absl::StrCat("action ", program.size(), ": ", action.status().message()));
    program.push_back(*action);
  }
  return program;
}

std::string FormatProgram(const Program& program) {
  return absl::StrJoin(program, " ", [](std::string* out, const Action& action) { absl::StrAppend(out, ToString(action)); });
}

}  // namespace ppft::pipeline
