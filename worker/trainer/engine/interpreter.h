// Executes a rank's program, action by action, over its stages. The program says everything about order; this says only how one action is done.
//
// A receive is posted by RECV and waited for by the F or B that consumes it. Neighbouring stages on one rank hand over in memory. Actions of an empty
// micro-batch do nothing, on every rank.
//
// Thread: the trainer's, one at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/pipeline/action.h"
#include "common/pipeline/mesh.h"
#include "worker/trainer/comm/transport.h"
#include "worker/trainer/engine/activity.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

struct PassOptions {
  int64_t pass = 0;  // equal on all ranks and never used twice
  bool keep_for_backward = false;
  // A rank may come to its part, or be through with it, long after another. The sender tells on the control channel when a message is under way, and the
  // receiver waits for that in Section::kAwaitExport: neither a device nor the stall timeout waits for work of unknown length.
  bool announced = false;
  // Set: the last stage calls this instead of its forward with loss.
  std::function<absl::Status(StageModel& stage, const MicrobatchInput& input, const at::Tensor& hidden_in)> last_stage;
};

class Interpreter {
 public:
  // `stages` of this rank by stage number; `transport` may be null for a single rank. All outlive this object. `device`: the stages' and the transport's.
  Interpreter(int rank, const pipeline::Mesh& mesh, std::map<int, StageModel*> stages, int64_t hidden_size, at::ScalarType dtype, Transport* transport,
              Activity* activity, const at::Device& device = at::kCPU);

  // inputs: of this replica, by the program's micro-batch number. The last stage adds its sum of -log p to *loss_sum, or with loss_sum null to its
  // loss_total().
  // INVALID_ARGUMENT for a program that uses what it has not made. After an error the object is spent.
  absl::Status Run(const pipeline::Program& program, const std::vector<MicrobatchInput>& inputs, const PassOptions& options, double* loss_sum);

  // Other models for the same stages (verification).
  void SetStages(std::map<int, StageModel*> stages) { stages_ = std::move(stages); }

 private:
  using Key = std::pair<int, int>;  // stage, micro-batch
  struct Incoming {
    at::Tensor tensor;  // [tokens, hidden]
    bool posted = false;
    Ticket ticket = 0;
    std::optional<Ticket> announcement;
  };
  struct Pass {
    const std::vector<MicrobatchInput>& inputs;
    const PassOptions& options;
    double* loss_sum;
  };

  absl::Status Execute(const pipeline::Action& action, const Pass& pass);
  absl::Status Idle(const pipeline::Action& action);
  absl::Status Forward(const pipeline::Action& action, const Pass& pass);
  absl::Status Backward(const pipeline::Action& action, const Pass& pass);
  absl::Status Send(const pipeline::Action& action, const Pass& pass);
  absl::Status Receive(const pipeline::Action& action, const Pass& pass);
  // The tensor that `receive` brings, received or handed over; waits for it.
  absl::StatusOr<at::Tensor> Take(std::map<Key, Incoming>* incoming, const pipeline::Action& receive);
  bool IsLocal(int stage) const { return stages_.count(stage) != 0; }
  int num_stages() const { return mesh_.num_stages(); }

  const int rank_;
  const pipeline::Mesh mesh_;
  std::map<int, StageModel*> stages_;
  const int64_t hidden_size_;
  const at::TensorOptions hidden_;  // dtype and device of what is sent
  Transport* const transport_;
  Activity* const activity_;

  // Of the running pass; empty between passes.
  std::map<Key, Incoming> inputs_;      // by the stage that will go forward
  std::map<Key, Incoming> gradients_;   // by the stage that will go backward
  std::map<Key, at::Tensor> outputs_;   // waiting for SEND_F, by the stage that made them
  std::map<Key, at::Tensor> grad_ins_;  // waiting for SEND_B
};

}  // namespace ppft::trainer
