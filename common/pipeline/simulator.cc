#include "common/pipeline/simulator.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/pipeline/channel.h"

namespace ppft::pipeline {
namespace {

// When each end of a channel reached its k-th message. Entries appear as the ranks get there.
struct ChannelTimes {
  Channel channel;
  int num_messages = 0;
  std::vector<double> sent;      // the send was accepted
  std::vector<double> posted;    // the receive was reached
  std::vector<double> consumed;  // the compute action that takes it started
};

constexpr double kNotYet = -1;

class Simulator {
 public:
  Simulator(const std::vector<Program>& programs, const Work& work, const SimulationOptions& options)
      : programs_(programs),
        work_(work),
        options_(options),
        num_ranks_(static_cast<int>(programs.size())),
        next_(num_ranks_, 0),
        now_(num_ranks_, 0),
        computed_(static_cast<size_t>(work.num_stages) * 6 * work.num_microbatches, kNotYet),
        place_(computed_.size(), 0),
        channels_(2 * num_ranks_) {}

  absl::StatusOr<Simulation> Run() {
    Number();
    result_.spans.resize(num_ranks_);
    for (bool moved = true; moved;) {
      moved = false;
      for (int rank = 0; rank < num_ranks_; ++rank) {
        while (next_[rank] < programs_[rank].size() && Advance(rank)) moved = true;
      }
    }
    std::vector<std::string> waiting;
    for (int rank = 0; rank < num_ranks_; ++rank) {
      if (next_[rank] < programs_[rank].size()) waiting.push_back(absl::StrCat("rank ", rank, " stands at ", ToString(Current(rank)), WaitsFor(Current(rank))));
    }
    if (!waiting.empty()) return absl::FailedPreconditionError(absl::StrCat("deadlock: ", absl::StrJoin(waiting, "; ")));
    Summarise();
    return std::move(result_);
  }

 private:
  const Action& Current(int rank) const { return programs_[rank][next_[rank]]; }

  // The channel of a transfer; a rank has one way on and one way back.
  ChannelTimes& ChannelFor(const Action& transfer) {
    const Channel channel = ChannelOf(transfer, num_ranks_);
    return channels_[2 * channel.from + (channel.gradients ? 1 : 0)];
  }

  size_t IndexOf(const Action& action) const {
    return (static_cast<size_t>(action.stage) * 6 + static_cast<size_t>(action.op)) * work_.num_microbatches + action.microbatch;
  }

  // Each transfer's place in its channel.
  void Number() {
    for (const Program& program : programs_) {
      for (const Action& action : program) {
        if (!IsSend(action.op)) continue;
        ChannelTimes& times = ChannelFor(action);
        times.channel = ChannelOf(action, num_ranks_);
        place_[IndexOf(MatchingReceive(action))] = place_[IndexOf(action)] = times.num_messages++;
      }
    }
  }

  double Cost(const Action& action) const {
    const std::vector<double>& costs = action.op == Op::kForward ? options_.forward_cost : options_.backward_cost;
    return costs.empty() ? 1.0 : costs[action.stage];
  }

  // Runs the rank's next action if what it needs has happened.
  bool Advance(int rank) {
    const Action& action = Current(rank);
    std::optional<Span> span;
    if (IsCompute(action.op)) {
      span = Compute(rank, action);
    } else if (IsSend(action.op)) {
      span = Send(rank, action);
    } else {
      span = Receive(rank, action);
    }
    if (!span) return false;
    result_.spans[rank].push_back(*span);
    now_[rank] = span->end;
    ++next_[rank];
    return true;
  }

  std::optional<Span> Compute(int rank, const Action& action) {
    double start = now_[rank];
    const std::optional<Action> receive = ReceiveBefore(action, work_.num_stages);
    if (receive && num_ranks_ > 1) {
      ChannelTimes& channel = ChannelFor(*receive);
      const size_t place = place_[IndexOf(*receive)];
      if (channel.sent.size() <= place) return std::nullopt;
      start = std::max(start, channel.sent[place] + options_.send_latency);
      if (channel.consumed.size() <= place) channel.consumed.resize(place + 1);
      channel.consumed[place] = start;
    } else if (receive) {
      const double done = computed_[IndexOf({MatchingSend(*receive).stage, action.op, action.microbatch})];
      if (done == kNotYet) return std::nullopt;
      start = std::max(start, done);
    }
    const double end = start + Cost(action);
    computed_[IndexOf(action)] = end;
    return Span{start, end};
  }

  // A send that has to wait is accepted when receive number (its place - capacity) is posted.
  std::optional<Span> Send(int rank, const Action& action) {
    ChannelTimes& channel = ChannelFor(action);
    double end = now_[rank];
    const int place = place_[IndexOf(action)];
    if (options_.channel_capacity != kUnbounded && place >= options_.channel_capacity) {
      const size_t needed = place - options_.channel_capacity;
      if (channel.posted.size() <= needed) return std::nullopt;
      end = std::max(end, channel.posted[needed]);
    }
    channel.sent.push_back(end);
    return Span{now_[rank], end};
  }

  std::optional<Span> Receive(int rank, const Action& action) {
    ChannelTimes& channel = ChannelFor(action);
    const size_t place = place_[IndexOf(action)];
    if (channel.posted.size() == place) channel.posted.push_back(now_[rank]);
    if (!options_.blocking_receives) return Span{now_[rank], now_[rank]};
    if (channel.sent.size() <= place) return std::nullopt;
    return Span{now_[rank], std::max(now_[rank], channel.sent[place] + options_.send_latency)};
  }

  std::string WaitsFor(const Action& action) const {
    if (IsSend(action.op)) return absl::StrCat(" (waits for the channel to rank ", MatchingReceive(action).stage % num_ranks_, ")");
    const std::optional<Action> receive = IsReceive(action.op) ? action : ReceiveBefore(action, work_.num_stages);
    if (!receive) return "";
    return absl::StrCat(" (waits for ", ToString(MatchingSend(*receive)), " of rank ", MatchingSend(*receive).stage % num_ranks_, ")");
  }

  void Summarise() {
    double busy_total = 0;
    for (double end : now_) result_.makespan = std::max(result_.makespan, end);
    for (int rank = 0; rank < num_ranks_; ++rank) {
      double busy = 0;
      for (const Action& action : programs_[rank]) busy += IsCompute(action.op) ? Cost(action) : 0.0;
      result_.rank_bubble_ratio.push_back(result_.makespan > 0 ? 1 - busy / result_.makespan : 0);
      result_.peak_activations.push_back(PeakActivations(programs_[rank]));
      busy_total += busy;
    }
    if (result_.makespan > 0) result_.bubble_ratio = 1 - busy_total / (num_ranks_ * result_.makespan);
    for (const ChannelTimes& times : channels_) {
      if (times.num_messages == 0) continue;
      const Channel& channel = times.channel;
      ChannelUse use{channel.from, channel.to, channel.gradients, times.num_messages};
      use.peak_posted = PeakPosted(channel);
      use.peak_in_flight = PeakBetween(times.sent, times.consumed);
      result_.channels.push_back(use);
    }
  }

  int PeakActivations(const Program& program) const {
    if (work_.forward_only) return 0;
    int held = 0, peak = 0;
    for (const Action& action : program) {
      if (action.op == Op::kForward) peak = std::max(peak, ++held);
      if (action.op == Op::kBackward) --held;
    }
    return peak;
  }

  int PeakPosted(const Channel& channel) const {
    int held = 0, peak = 0;
    for (const Action& action : programs_[channel.to]) {
      if (IsReceive(action.op)) {
        if (ChannelOf(action, num_ranks_) == channel) peak = std::max(peak, ++held);
      } else if (const std::optional<Action> receive = ReceiveBefore(action, work_.num_stages); receive && ChannelOf(*receive, num_ranks_) == channel) {
        --held;
      }
    }
    return peak;
  }

  // The most messages between their two times at once; one that is consumed as the next is sent makes room first.
  static int PeakBetween(const std::vector<double>& begin, const std::vector<double>& end) {
    std::vector<std::pair<double, int>> events;
    for (size_t i = 0; i < begin.size(); ++i) {
      if (begin[i] >= end[i]) continue;
      events.emplace_back(begin[i], 1);
      events.emplace_back(end[i], -1);
    }
    std::sort(events.begin(), events.end());
    int held = 0, peak = 0;
    for (const auto& [time, change] : events) peak = std::max(peak, held += change);
    return std::max(peak, begin.empty() ? 0 : 1);
  }

  const std::vector<Program>& programs_;
  const Work& work_;
  const SimulationOptions& options_;
  const int num_ranks_;

  std::vector<size_t> next_;  // per rank
  std::vector<double> now_;
  std::vector<double> computed_;        // by IndexOf: end of each compute action that ran, else kNotYet
  std::vector<int> place_;              // by IndexOf: of each transfer in its channel
  std::vector<ChannelTimes> channels_;  // [2 * from + gradients]
  Simulation result_;
};

}  // namespace

SimulationOptions RendezvousOptions() {
  SimulationOptions options;
  options.channel_capacity = 0;
  options.blocking_receives = true;
  return options;
}

absl::StatusOr<Simulation> Simulate(const std::vector<Program>& programs, const Work& work, const SimulationOptions& options) {
  if (absl::Status status = CheckPrograms(programs, work); !status.ok()) return status;
  for (const std::vector<double>* costs : {&options.forward_cost, &options.backward_cost}) {
    if (!costs->empty() && static_cast<int>(costs->size()) != work.num_stages) {
      return absl::InvalidArgumentError(absl::StrCat(costs->size(), " costs for ", work.num_stages, " stages"));
    }
  }
  return Simulator(programs, work, options).Run();
}

}  // namespace ppft::pipeline
