// CheckPrograms of simulator.h: everything that can be said about programs without running them.
#include <map>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/pipeline/channel.h"
#include "common/pipeline/simulator.h"

namespace ppft::pipeline {
namespace {

class Checker {
 public:
  Checker(const std::vector<Program>& programs, const Work& work)
      : programs_(programs),
        work_(work),
        num_ranks_(static_cast<int>(programs.size())),
        place_(static_cast<size_t>(work.num_stages) * 6 * work.num_microbatches, kMissing) {}

  absl::Status Run() {
    if (num_ranks_ < 1 || work_.num_stages % num_ranks_ != 0) {
      return absl::FailedPreconditionError(absl::StrCat(num_ranks_, " programs cannot hold ", work_.num_stages, " stages"));
    }
    for (int rank = 0; rank < num_ranks_; ++rank) {
      if (absl::Status status = IndexRank(rank); !status.ok()) return status;
    }
    for (int stage = 0; stage < work_.num_stages; ++stage) {
      for (int microbatch = 0; microbatch < work_.num_microbatches; ++microbatch) {
        if (absl::Status status = CheckStage(stage, microbatch); !status.ok()) return status;
      }
    }
    return CheckChannels();
  }

 private:
  static constexpr int kMissing = -1;

  int& Place(const Action& action) {
    return place_[(static_cast<size_t>(action.stage) * 6 + static_cast<size_t>(action.op)) * work_.num_microbatches + action.microbatch];
  }

  static absl::Status Wrong(int rank, const Action& action, absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat("rank ", rank, ": ", ToString(action), " ", what));
  }

  // Every action once, on the right rank, and of a kind that this work has.
  absl::Status IndexRank(int rank) {
    for (size_t i = 0; i < programs_[rank].size(); ++i) {
      const Action& action = programs_[rank][i];
      const bool exists = action.stage >= 0 && action.stage < work_.num_stages && action.microbatch >= 0 && action.microbatch < work_.num_microbatches;
      if (!exists) return Wrong(rank, action, absl::StrCat("is outside ", work_.num_stages, " stages and ", work_.num_microbatches, " micro-batches"));
      if (action.stage % num_ranks_ != rank) return Wrong(rank, action, absl::StrCat("belongs to rank ", action.stage % num_ranks_));
      const bool backward = action.op == Op::kBackward || action.op == Op::kSendBackward || action.op == Op::kRecvBackward;
      if (backward && work_.forward_only) return Wrong(rank, action, "in a program without backward");
      if (!IsCompute(action.op) && !IsHandOver(action)) return Wrong(rank, action, "has no other rank at its end");
      if (Place(action) != kMissing) return Wrong(rank, action, "appears twice");
      Place(action) = static_cast<int>(i);
    }
    return absl::OkStatus();
  }

  bool IsHandOver(const Action& transfer) const {
    if (num_ranks_ == 1) return false;
    const Action peer = IsSend(transfer.op) ? MatchingReceive(transfer) : MatchingSend(transfer);
    return peer.stage >= 0 && peer.stage < work_.num_stages;
  }

  absl::Status CheckStage(int stage, int microbatch) {
    const Action forward{stage, Op::kForward, microbatch};
    if (absl::Status status = CheckCompute(forward); !status.ok() || work_.forward_only) return status;
    const Action backward{stage, Op::kBackward, microbatch};
    if (absl::Status status = CheckCompute(backward); !status.ok()) return status;
    if (Place(backward) < Place(forward)) return Wrong(RankOf(backward), backward, absl::StrCat("comes before ", ToString(forward)));
    return absl::OkStatus();
  }

  // There, with its receive before it and its send behind it.
  absl::Status CheckCompute(const Action& compute) {
    const int rank = RankOf(compute);
    const int here = Place(compute);
    if (here == kMissing) return Wrong(rank, compute, "is missing");
    if (num_ranks_ == 1) return absl::OkStatus();
    if (const std::optional<Action> receive = ReceiveBefore(compute, work_.num_stages)) {
      const int there = Place(*receive);
      if (there == kMissing) return Wrong(rank, *receive, "is missing");
      if (there > here) return Wrong(rank, *receive, absl::StrCat("comes after ", ToString(compute), ", which needs it"));
    }
    if (const std::optional<Action> send = SendAfter(compute, work_.num_stages)) {
      const int there = Place(*send);
      if (there == kMissing) return Wrong(rank, *send, "is missing");
      if (there < here) return Wrong(rank, *send, absl::StrCat("comes before ", ToString(compute), ", which makes it"));
    }
    return absl::OkStatus();
  }

  absl::Status CheckChannels() const {
    std::map<Channel, std::vector<Action>> sends, receives;
    for (const Program& program : programs_) {
      for (const Action& action : program) {
        if (IsSend(action.op)) sends[ChannelOf(action, num_ranks_)].push_back(action);
        if (IsReceive(action.op)) receives[ChannelOf(action, num_ranks_)].push_back(action);
      }
    }
    for (const auto& [channel, sent] : sends) {
      const std::vector<Action>& received = receives[channel];
      for (size_t k = 0; k < sent.size() && k < received.size(); ++k) {
        if (MatchingReceive(sent[k]) == received[k]) continue;
        return absl::FailedPreconditionError(absl::StrCat("order of ", channel.gradients ? "gradients" : "activations", " from rank ", channel.from,
                                                          " to rank ", channel.to, ": message ", k, " is sent by ", ToString(sent[k]), " and taken by ",
                                                          ToString(received[k])));
      }
    }
    return absl::OkStatus();
  }

  int RankOf(const Action& action) const { return action.stage % num_ranks_; }

  const std::vector<Program>& programs_;
  const Work& work_;
  const int num_ranks_;
  std::vector<int> place_;  // by stage, operation, micro-batch: place in its rank's program
};

}  // namespace

absl::Status CheckPrograms(const std::vector<Program>& programs, const Work& work) {
  if (work.num_stages < 1 || work.num_microbatches < 1) {
    return absl::FailedPreconditionError(absl::StrCat("nothing to do: ", work.num_stages, " stages, ", work.num_microbatches, " micro-batches"));
  }
  return Checker(programs, work).Run();
}

}  // namespace ppft::pipeline
