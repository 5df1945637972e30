#include "worker/trainer/engine/interpreter.h"

#include <ATen/ops/empty.h>

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/engine/batches.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

using pipeline::Action;
using pipeline::Op;

Buffer BufferOf(const at::Tensor& tensor) {
  auto owner = std::make_shared<at::Tensor>(tensor);
  Buffer buffer;
  buffer.data = owner->data_ptr();
  buffer.bytes = static_cast<int64_t>(owner->nbytes());
  buffer.owner = owner;
  return buffer;
}

// Of a message's announcement. Groups, the control channel's other users, count micro-batch 0 alone.
Tag AnnouncementOf(const Tag& message) { return {message.pass, message.stage, -1 - message.microbatch}; }

Buffer OneByte() {
  auto owner = std::make_shared<char>('\0');
  Buffer buffer;
  buffer.data = owner.get();
  buffer.bytes = 1;
  buffer.owner = owner;
  return buffer;
}

absl::Status Missing(const Action& action, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("the program does ", pipeline::ToString(action), " without ", what));
}

}  // namespace

Interpreter::Interpreter(int rank, const pipeline::Mesh& mesh, std::map<int, StageModel*> stages, int64_t hidden_size, at::ScalarType dtype,
                         Transport* transport, Activity* activity, const at::Device& device)
    : rank_(rank),
      mesh_(mesh),
      stages_(std::move(stages)),
      hidden_size_(hidden_size),
      hidden_(at::TensorOptions().dtype(dtype).device(device)),
      transport_(transport),
      activity_(activity) {}

absl::Status Interpreter::Run(const pipeline::Program& program, const std::vector<MicrobatchInput>& inputs, const PassOptions& options, double* loss_sum) {
  const Pass pass{inputs, options, loss_sum};
  for (const Action& action : program) {
    if (action.microbatch < 0 || action.microbatch >= static_cast<int>(inputs.size()) || !IsLocal(action.stage)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the program's action ", pipeline::ToString(action), " has a stage or micro-batch that this rank does not have"));
    }
    if (TokensOf(inputs[static_cast<size_t>(action.microbatch)]) == 0) {
      PPFT_RETURN_IF_ERROR(Idle(action));
      continue;
    }
    PPFT_RETURN_IF_ERROR(Annotate(Execute(action, pass), pipeline::ToString(action)));
  }
  if (!inputs_.empty() || !gradients_.empty() || !outputs_.empty() || !grad_ins_.empty()) {
    return absl::InvalidArgumentError("the program leaves tensors that nothing consumes");
  }
  return absl::OkStatus();
}

// The replicas may have tokens where this one has none, and need it for what they do together.
absl::Status Interpreter::Idle(const Action& action) {
  if (action.op != Op::kForward && action.op != Op::kBackward) return absl::OkStatus();
  activity_->Enter(Section::kReduce, &action);
  return Annotate(stages_[action.stage]->Idle(action.op == Op::kBackward), pipeline::ToString(action));
}

absl::Status Interpreter::Execute(const Action& action, const Pass& pass) {
  return CatchTorch("", [&]() -> absl::Status {
    switch (action.op) {
      case Op::kForward:
        return Forward(action, pass);
      case Op::kBackward:
        return Backward(action, pass);
      case Op::kSendForward:
      case Op::kSendBackward:
        return Send(action, pass);
      case Op::kRecvForward:
      case Op::kRecvBackward:
        return Receive(action, pass);
    }
    return absl::InvalidArgumentError("unknown action");
  });
}

absl::StatusOr<at::Tensor> Interpreter::Take(std::map<Key, Incoming>* incoming, const Action& receive) {
  auto found = incoming->find({receive.stage, receive.microbatch});
  if (found == incoming->end()) return absl::NotFoundError("");
  Incoming message = std::move(found->second);
  incoming->erase(found);
  if (message.announcement.has_value()) {
    activity_->Enter(Section::kAwaitExport, &receive);
    PPFT_RETURN_IF_ERROR(transport_->Wait(*message.announcement));
  }
  if (message.posted) {
    activity_->Enter(Section::kReceive, &receive);
    PPFT_RETURN_IF_ERROR(transport_->Wait(message.ticket));
  }
  return message.tensor;
}

absl::Status Interpreter::Forward(const Action& action, const Pass& pass) {
  const MicrobatchInput& input = pass.inputs[static_cast<size_t>(action.microbatch)];
  const Key key{action.stage, action.microbatch};
  at::Tensor hidden_in;
  if (action.stage > 0) {
    absl::StatusOr<at::Tensor> taken = Take(&inputs_, {action.stage, Op::kRecvForward, action.microbatch});
    if (absl::IsNotFound(taken.status())) return Missing(action, "its input");
    PPFT_RETURN_IF_ERROR(taken.status());
    hidden_in = *std::move(taken);
  }
  StageModel& stage = *stages_[action.stage];
  activity_->Enter(Section::kForward, &action);
  const bool last = action.stage + 1 == num_stages();
  if (last && pass.options.last_stage) return pass.options.last_stage(stage, input, hidden_in);
  PPFT_ASSIGN_OR_RETURN(at::Tensor out, stage.Forward(input, hidden_in, pass.options.keep_for_backward, pass.loss_sum));
  if (last) return absl::OkStatus();
  if (IsLocal(action.stage + 1)) {
    inputs_[{action.stage + 1, action.microbatch}] = Incoming{std::move(out)};
  } else {
    outputs_[key] = std::move(out);
  }
  return absl::OkStatus();
}

absl::Status Interpreter::Backward(const Action& action, const Pass& pass) {
  const MicrobatchInput& input = pass.inputs[static_cast<size_t>(action.microbatch)];
  const Key key{action.stage, action.microbatch};
  at::Tensor grad_out;
  if (action.stage + 1 < num_stages()) {
    absl::StatusOr<at::Tensor> taken = Take(&gradients_, {action.stage, Op::kRecvBackward, action.microbatch});
    if (absl::IsNotFound(taken.status())) return Missing(action, "its gradient");
    PPFT_RETURN_IF_ERROR(taken.status());
    grad_out = *std::move(taken);
  }
  activity_->Enter(Section::kBackward, &action);
  PPFT_ASSIGN_OR_RETURN(at::Tensor grad_in, stages_[action.stage]->Backward(input, grad_out));
  if (action.stage == 0) return absl::OkStatus();
  if (IsLocal(action.stage - 1)) {
    gradients_[{action.stage - 1, action.microbatch}] = Incoming{std::move(grad_in)};
  } else {
    grad_ins_[key] = std::move(grad_in);
  }
  return absl::OkStatus();
}

absl::Status Interpreter::Send(const Action& action, const Pass& pass) {
  const bool forward = action.op == Op::kSendForward;
  const int to_stage = forward ? action.stage + 1 : action.stage - 1;
  if (to_stage < 0 || to_stage >= num_stages()) return Missing(action, "a stage to send to");
  if (IsLocal(to_stage)) return absl::OkStatus();  // already handed over
  std::map<Key, at::Tensor>& made = forward ? outputs_ : grad_ins_;
  auto found = made.find({action.stage, action.microbatch});
  if (found == made.end()) return Missing(action, "having made it");
  const at::Tensor tensor = found->second.contiguous();
  made.erase(found);
  activity_->Enter(Section::kSend, &action);
  const int peer = mesh_.RankOfStage(mesh_.ReplicaOf(rank_), to_stage);
  const Tag tag{pass.options.pass, action.stage, action.microbatch};
  PPFT_RETURN_IF_ERROR(transport_->Send(peer, forward ? Channel::kActivations : Channel::kGradients, tag, BufferOf(tensor)));
  return pass.options.announced ? transport_->Send(peer, Channel::kControl, AnnouncementOf(tag), OneByte()) : absl::OkStatus();
}

absl::Status Interpreter::Receive(const Action& action, const Pass& pass) {
  const bool forward = action.op == Op::kRecvForward;
  const int from_stage = forward ? action.stage - 1 : action.stage + 1;
  if (from_stage < 0 || from_stage >= num_stages()) return Missing(action, "a stage to receive from");
  if (IsLocal(from_stage)) return absl::OkStatus();
  const MicrobatchInput& input = pass.inputs[static_cast<size_t>(action.microbatch)];
  Incoming message;
  message.tensor = at::empty({TokensOf(input), hidden_size_}, hidden_);
  message.posted = true;
  const int peer = mesh_.RankOfStage(mesh_.ReplicaOf(rank_), from_stage);
  const Tag tag{pass.options.pass, from_stage, action.microbatch};
  PPFT_ASSIGN_OR_RETURN(message.ticket, transport_->PostReceive(peer, forward ? Channel::kActivations : Channel::kGradients, tag, BufferOf(message.tensor)));
  if (pass.options.announced) {
    PPFT_ASSIGN_OR_RETURN(message.announcement, transport_->PostReceive(peer, Channel::kControl, AnnouncementOf(tag), OneByte()));
  }
  std::map<Key, Incoming>& incoming = forward ? inputs_ : gradients_;
  incoming[{action.stage, action.microbatch}] = std::move(message);
  return absl::OkStatus();
}

}  // namespace ppft::trainer
