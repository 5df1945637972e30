// Properties of every schedule over p in 1..8, v in 1..4, m in 1..32, and goldens that a person can read.
#include "common/pipeline/schedule.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "common/pipeline/channel.h"
#include "common/pipeline/lowering.h"
#include "common/pipeline/mesh.h"
#include "common/pipeline/simulator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace ppft::pipeline {
namespace {

using ::testing::HasSubstr;

std::string Name(const ScheduleShape& s) { return absl::StrCat(ToString(s.kind), " p=", s.pipeline_size, " v=", s.virtual_stages, " m=", s.num_microbatches); }

void ForEachShape(const std::function<void(const ScheduleShape&)>& visit) {
  for (int p = 1; p <= 8; ++p) {
    for (int m = 1; m <= 32; ++m) {
      visit({ScheduleKind::kGPipe, p, 1, m});
      visit({ScheduleKind::k1F1B, p, 1, m});
      for (int v = 1; v <= 4; ++v) visit({ScheduleKind::kInterleaved1F1B, p, v, m});
    }
  }
}

Work WorkOf(const ScheduleShape& s) { return {s.pipeline_size * s.virtual_stages, s.num_microbatches}; }

std::vector<Program> Lowered(const ScheduleShape& s) {
  absl::StatusOr<std::vector<Program>> compute = BuildSchedule(s);
  EXPECT_TRUE(compute.ok()) << compute.status();
  absl::StatusOr<std::vector<Program>> programs = Lower(*compute, s.pipeline_size * s.virtual_stages);
  EXPECT_TRUE(programs.ok()) << Name(s) << ": " << programs.status();
  return *programs;
}

// What theory says for `pipeline_rank`, micro-batches times stages; for interleaving with g the largest group.
int TheoreticalPeakActivations(const ScheduleShape& s, int pipeline_rank) {
  const int total = s.virtual_stages * s.num_microbatches, behind = s.pipeline_size - pipeline_rank - 1;
  const int groups = std::max(1, s.num_microbatches / s.pipeline_size), g = (s.num_microbatches + groups - 1) / groups;
  if (s.kind == ScheduleKind::kGPipe) return total;
  if (s.kind == ScheduleKind::k1F1B) return std::min(total, behind + 1);
  return std::min(total, 2 * behind + (s.virtual_stages - 1) * g + 1);
}

// The idle share when all stages cost the same (m >= p when interleaved).
double IdealBubbleRatio(const ScheduleShape& s) {
  const double idle = s.pipeline_size - 1;
  return idle / (static_cast<double>(s.virtual_stages) * s.num_microbatches + idle);
}

TEST(ScheduleTest, EveryShapeIsLegalAndFreeOfDeadlockUnderEveryTransport) {
  ForEachShape([](const ScheduleShape& s) {
    const std::vector<Program> programs = Lowered(s);
    for (int capacity : {0, 1, 2, kUnbounded}) {
      for (bool blocking : {false, true}) {
        SimulationOptions options;
        options.channel_capacity = capacity;
        options.blocking_receives = blocking;
        absl::StatusOr<Simulation> run = Simulate(programs, WorkOf(s), options);
        ASSERT_TRUE(run.ok()) << Name(s) << " capacity " << capacity << " blocking " << blocking << ": " << run.status();
      }
    }
  });
}

TEST(ScheduleTest, PeakActivationsEqualTheory) {
  ForEachShape([](const ScheduleShape& s) {
    absl::StatusOr<Simulation> run = Simulate(Lowered(s), WorkOf(s), {});
    ASSERT_TRUE(run.ok()) << run.status();
    for (int rank = 0; rank < s.pipeline_size; ++rank) {
      EXPECT_EQ(run->peak_activations[rank], TheoreticalPeakActivations(s, rank)) << Name(s) << " rank " << rank;
      if (s.kind == ScheduleKind::kGPipe) {
        EXPECT_EQ(run->peak_activations[rank], s.num_microbatches);
      }
      if (s.kind == ScheduleKind::k1F1B) {
        EXPECT_EQ(run->peak_activations[rank], std::min(s.num_microbatches, s.pipeline_size - rank));
      }
    }
  });
}

TEST(ScheduleTest, BubbleOfEqualStagesIsTheIdealOne) {
  ForEachShape([](const ScheduleShape& s) {
    if (s.kind == ScheduleKind::kInterleaved1F1B && s.virtual_stages > 1 && s.num_microbatches < s.pipeline_size) return;
    absl::StatusOr<Simulation> run = Simulate(Lowered(s), WorkOf(s), {});
    ASSERT_TRUE(run.ok()) << run.status();
    EXPECT_NEAR(run->bubble_ratio, IdealBubbleRatio(s), 1e-12) << Name(s);
    if (s.virtual_stages == 1) {
      EXPECT_NEAR(run->bubble_ratio, (s.pipeline_size - 1.0) / (s.num_microbatches + s.pipeline_size - 1.0), 1e-12) << Name(s);
    }
  });
}

// A transfer that takes no time costs no time either: posted receives and unlimited buffers run as fast as the compute order allows.
TEST(ScheduleTest, BuffersNeededAreBounded) {
  ForEachShape([](const ScheduleShape& s) {
    absl::StatusOr<Simulation> run = Simulate(Lowered(s), WorkOf(s), {});
    ASSERT_TRUE(run.ok()) << run.status();
    const int total = s.num_microbatches * s.virtual_stages;
    for (const ChannelUse& use : run->channels) {
      EXPECT_LE(use.peak_in_flight, use.peak_posted) << Name(s) << " " << use.from << "->" << use.to;
      EXPECT_LE(use.peak_posted, total);
      if (s.kind == ScheduleKind::k1F1B) {
        EXPECT_LE(use.peak_posted, 2) << Name(s) << " " << use.from << "->" << use.to << " gradients " << use.gradients;
      }
    }
  });
}

// Between GPUs a receive is queued when the action that consumes its message begins, with those before it on its channel.
Program WithLateReceives(const Program& program, int pipeline_size) {
  const auto channel = [&](const Action& receive) {
    return std::make_pair(receive.op, (receive.stage + (receive.op == Op::kRecvForward ? -1 : 1) + pipeline_size) % pipeline_size);
  };
  Program late, waiting;
  for (const Action& action : program) {
    if (IsReceive(action.op)) {
      waiting.push_back(action);
      continue;
    }
    const Action needed{action.stage, action.op == Op::kForward ? Op::kRecvForward : Op::kRecvBackward, action.microbatch};
    const auto last = IsCompute(action.op) ? std::find(waiting.begin(), waiting.end(), needed) : waiting.end();
    if (last != waiting.end()) {
      Program kept;
      for (auto receive = waiting.begin(); receive != waiting.end(); ++receive) {
        (receive <= last && channel(*receive) == channel(needed) ? late : kept).push_back(*receive);
      }
      waiting = kept;
    }
    late.push_back(action);
  }
  return late;
}

TEST(ScheduleTest, LateReceivesNeedRoomForAMessageOfEachStageInARowAndOne) {
  ForEachShape([](const ScheduleShape& s) {
    std::vector<Program> programs;
    for (const Program& program : Lowered(s)) programs.push_back(WithLateReceives(program, s.pipeline_size));
    SimulationOptions options;
    options.channel_capacity = s.pipeline_size + 1;
    absl::StatusOr<Simulation> run = Simulate(programs, WorkOf(s), options);
    ASSERT_TRUE(run.ok()) << Name(s) << ": " << run.status();
  });
}

TEST(ScheduleTest, UnequalCostsNeverDeadlockAndLatencyOnlyDelays) {
  ForEachShape([](const ScheduleShape& s) {
    SimulationOptions options;
    for (int stage = 0; stage < s.pipeline_size * s.virtual_stages; ++stage) {
      options.forward_cost.push_back(1 + (stage * 7) % 5);
      options.backward_cost.push_back(1 + (stage * 3) % 4);
    }
    const std::vector<Program> programs = Lowered(s);
    absl::StatusOr<Simulation> fast = Simulate(programs, WorkOf(s), options);
    options.send_latency = 0.5;
    absl::StatusOr<Simulation> slow = Simulate(programs, WorkOf(s), options);
    options.channel_capacity = 0;
    options.blocking_receives = true;
    absl::StatusOr<Simulation> strict = Simulate(programs, WorkOf(s), options);
    ASSERT_TRUE(fast.ok() && slow.ok() && strict.ok()) << Name(s);
    EXPECT_LE(fast->makespan, slow->makespan) << Name(s);
    EXPECT_LE(slow->makespan, strict->makespan) << Name(s);
    EXPECT_EQ(fast->peak_activations, strict->peak_activations) << Name(s);
  });
}

TEST(ScheduleTest, ForwardOnlyIsLegalAndHoldsNothing) {
  for (int p = 1; p <= 8; ++p) {
    for (int v = 1; v <= 4; ++v) {
      for (int m = 1; m <= 32; ++m) {
        absl::StatusOr<std::vector<Program>> compute = BuildForwardOnly(p, v, m);
        ASSERT_TRUE(compute.ok()) << compute.status();
        absl::StatusOr<std::vector<Program>> programs = Lower(*compute, p * v);
        ASSERT_TRUE(programs.ok()) << programs.status();
        absl::StatusOr<Simulation> run = Simulate(*programs, {p * v, m, true}, RendezvousOptions());
        ASSERT_TRUE(run.ok()) << p << " " << v << " " << m << ": " << run.status();
        EXPECT_EQ(*std::max_element(run->peak_activations.begin(), run->peak_activations.end()), 0);
      }
    }
  }
}

TEST(ScheduleTest, OneRankNeedsNoTransfers) {
  const std::vector<Program> programs = Lowered({ScheduleKind::kInterleaved1F1B, 1, 4, 6});
  EXPECT_EQ(programs[0].size(), 2u * 4 * 6);
  for (const Action& action : programs[0]) EXPECT_TRUE(IsCompute(action.op)) << ToString(action);
}

TEST(ScheduleTest, RefusesShapesThatAreNone) {
  EXPECT_THAT(std::string(BuildSchedule({ScheduleKind::k1F1B, 0, 1, 4}).status().message()), HasSubstr("pipeline_parallel_size (0)"));
  EXPECT_THAT(std::string(BuildSchedule({ScheduleKind::k1F1B, 2, 1, 0}).status().message()), HasSubstr("num_microbatches (0)"));
  EXPECT_THAT(std::string(BuildSchedule({ScheduleKind::kGPipe, 2, 2, 4}).status().message()), HasSubstr("interleaved_1f1b"));
  EXPECT_EQ(BuildForwardOnly(1, 0, 1).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ParseScheduleKind("zigzag").status().message()), HasSubstr("gpipe, 1f1b or interleaved_1f1b"));
}

TEST(MeshTest, RanksStagesAndGroups) {
  const Mesh mesh{2, 3, 2};
  EXPECT_EQ(mesh.num_ranks(), 6);
  EXPECT_EQ(mesh.num_stages(), 6);
  EXPECT_EQ(mesh.RankOfStage(1, 4), 4);  // replica 1, pipeline rank 1
  EXPECT_EQ(mesh.StagesOf(4), (std::vector<int>{1, 4}));
  EXPECT_EQ(mesh.ReplicaGroupOf(4), (std::vector<int>{1, 4}));
  EXPECT_EQ(mesh.PipelineOf(1), (std::vector<int>{3, 4, 5}));
  for (int rank = 0; rank < mesh.num_ranks(); ++rank) EXPECT_EQ(mesh.RankOf(mesh.ReplicaOf(rank), mesh.PipelineRankOf(rank)), rank);
}

// Each mutation of a good set of programs must be found, or leave a set that still runs under the strictest transport.
TEST(MutationTest, EverySwapOfNeighboursIsFoundOrHarmless) {
  int found = 0;
  for (const ScheduleShape& s : {ScheduleShape{ScheduleKind::kGPipe, 2, 1, 3}, {ScheduleKind::k1F1B, 3, 1, 5}, {ScheduleKind::kInterleaved1F1B, 2, 2, 4}}) {
    const std::vector<Program> good = Lowered(s);
    for (size_t rank = 0; rank < good.size(); ++rank) {
      for (size_t i = 0; i + 1 < good[rank].size(); ++i) {
        std::vector<Program> bad = good;
        std::swap(bad[rank][i], bad[rank][i + 1]);
        const Action a = good[rank][i], b = good[rank][i + 1];
        const std::string what = absl::StrCat(Name(s), " rank ", rank, ": ", ToString(a), " <-> ", ToString(b));
        absl::StatusOr<Simulation> strict = Simulate(bad, WorkOf(s), RendezvousOptions());
        found += !strict.ok();
        const bool same_channel = !IsCompute(a.op) && !IsCompute(b.op) && ChannelOf(a, s.pipeline_size) == ChannelOf(b, s.pipeline_size);
        const bool makes = IsSend(b.op) && IsCompute(a.op) && SendAfter(a, WorkOf(s).num_stages) == b;
        const bool takes = IsReceive(a.op) && IsCompute(b.op) && ReceiveBefore(b, WorkOf(s).num_stages) == a;
        if (same_channel || makes || takes) {
          EXPECT_FALSE(strict.ok()) << what;
          EXPECT_FALSE(Simulate(bad, WorkOf(s), {}).ok()) << what;
        }
      }
    }
  }
  EXPECT_GT(found, 40);
}

TEST(MutationTest, ASendAndAReceiveInTheWrongOrderDeadlockARendezvous) {
  // Both ranks first want to hand over: with nothing to buffer a message neither gets to its receive.
  std::vector<Program> programs = {*ParseProgram("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"),
                                   *ParseProgram("1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1")};
  EXPECT_TRUE(Simulate(programs, {2, 2}, {}).ok());
  absl::StatusOr<Simulation> run = Simulate(programs, {2, 2}, RendezvousOptions());
  EXPECT_EQ(run.status().code(), absl::StatusCode::kFailedPrecondition);
  const std::string message(run.status().message());
  EXPECT_THAT(message, HasSubstr("deadlock"));
  EXPECT_THAT(message, HasSubstr("rank 0 stands at 0SEND_F1"));
  EXPECT_THAT(message, HasSubstr("rank 1 stands at 1SEND_B0"));
}

TEST(MutationTest, ReceiveJustBeforeUseDeadlocksWhereTheSenderPlacedOneDoesNot) {
  std::vector<Program> programs = Lowered({ScheduleKind::k1F1B, 2, 1, 4});
  ASSERT_TRUE(Simulate(programs, {2, 4}, RendezvousOptions()).ok());
  for (Program& program : programs) {
    Program late;
    for (const Action& action : program) {
      if (IsReceive(action.op)) continue;
      if (IsCompute(action.op) && ReceiveBefore(action, 2)) late.push_back(*ReceiveBefore(action, 2));
      late.push_back(action);
    }
    program = late;
  }
  absl::StatusOr<Simulation> run = Simulate(programs, {2, 4}, RendezvousOptions());
  EXPECT_THAT(std::string(run.status().message()), HasSubstr("deadlock"));
}

TEST(MutationTest, ASmallerBufferThanTheOrderNeedsIsADeadlock) {
  // Rank 0 sends three before rank 1 posts anything but its first.
  const std::vector<Program> programs = {*ParseProgram("0F0 0SEND_F0 0F1 0SEND_F1 0F2 0SEND_F2 0RECV_B0 0B0 0RECV_B1 0B1 0RECV_B2 0B2"),
                                         *ParseProgram("1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1B2 1SEND_B2")};
  for (int capacity : {0, 1, 2}) {
    SimulationOptions options;
    options.channel_capacity = capacity;
    EXPECT_EQ(Simulate(programs, {2, 3}, options).ok(), capacity >= 1) << capacity;
  }
}

TEST(MutationTest, MissingDoubledAndStrayActionsAreNamed) {
  const std::vector<Program> good = Lowered({ScheduleKind::k1F1B, 2, 1, 2});
  const Work work{2, 2};
  for (size_t rank = 0; rank < good.size(); ++rank) {
    for (size_t i = 0; i < good[rank].size(); ++i) {
      std::vector<Program> missing = good;
      missing[rank].erase(missing[rank].begin() + i);
      EXPECT_THAT(std::string(CheckPrograms(missing, work).message()), HasSubstr(ToString(good[rank][i]) + " is missing"));
      std::vector<Program> doubled = good;
      doubled[rank].push_back(good[rank][i]);
      EXPECT_THAT(std::string(CheckPrograms(doubled, work).message()), HasSubstr(ToString(good[rank][i]) + " appears twice"));
    }
  }
  std::vector<Program> stray = good;
  stray[0].push_back({1, Op::kForward, 0});
  EXPECT_THAT(std::string(CheckPrograms(stray, work).message()), HasSubstr("belongs to rank 1"));
  stray = good;
  stray[0].push_back({0, Op::kRecvForward, 0});
  EXPECT_THAT(std::string(CheckPrograms(stray, work).message()), HasSubstr("no other rank"));
  stray = good;
  stray[0].push_back({0, Op::kForward, 2});
  EXPECT_THAT(std::string(CheckPrograms(stray, work).message()), HasSubstr("outside"));
  EXPECT_FALSE(CheckPrograms({}, work).ok());
  EXPECT_FALSE(CheckPrograms(good, {2, -1}).ok());
}

TEST(LoweringTest, NamesWhatWaitsWhenTheOrderCannotRun) {
  const std::vector<Program> compute = {*ParseProgram("0B0 0F0"), *ParseProgram("1F0 1B0")};
  const std::string message(Lower(compute, 2).status().message());
  EXPECT_THAT(message, HasSubstr("rank 0 waits at 0B0"));
  EXPECT_THAT(message, HasSubstr("rank 1 waits at 1F0"));
  EXPECT_FALSE(Lower({*ParseProgram("0F0 0SEND_F0"), {}}, 2).ok());
  EXPECT_FALSE(Lower({*ParseProgram("1F0"), {}}, 2).ok());
}

TEST(SimulatorTest, ImbalanceShowsAsBubble) {
  SimulationOptions options;
  options.forward_cost = {1, 1, 1, 2};
  options.backward_cost = {1, 1, 1, 2};
  const ScheduleShape s{ScheduleKind::k1F1B, 4, 1, 16};
  absl::StatusOr<Simulation> run = Simulate(Lowered(s), WorkOf(s), options);
  ASSERT_TRUE(run.ok()) << run.status();
  EXPECT_EQ(run->makespan, 3 + 16 * 4 + 3);  // in, the slowest stage without a pause, out
  EXPECT_NEAR(run->rank_bubble_ratio[3], 1 - 64.0 / 70, 1e-12);
  EXPECT_NEAR(run->rank_bubble_ratio[0], 1 - 32.0 / 70, 1e-12);
  options.forward_cost = {1, 1};
  EXPECT_EQ(Simulate(Lowered(s), WorkOf(s), options).status().code(), absl::StatusCode::kInvalidArgument);
}

// A row per rank, a column per unit of time, idle time as ".". Only compute actions are drawn; costs are whole numbers.
std::string DrawTimeline(const std::vector<Program>& programs, const Simulation& simulation) {
  size_t width = 0;
  for (const Program& program : programs) {
    for (const Action& action : program) {
      if (IsCompute(action.op)) width = std::max(width, ToString(action).size());
    }
  }
  const int columns = static_cast<int>(std::lround(simulation.makespan));
  std::string picture;
  for (size_t rank = 0; rank < programs.size(); ++rank) {
    std::vector<std::string> row(columns, ".");
    for (size_t i = 0; i < programs[rank].size(); ++i) {
      if (!IsCompute(programs[rank][i].op)) continue;
      const Span& span = simulation.spans[rank][i];
      const int end = std::min(columns, static_cast<int>(std::lround(span.end)));
      for (int c = static_cast<int>(std::lround(span.start)); c < end; ++c) row[c] = ToString(programs[rank][i]);
    }
    std::string line = absl::StrCat("rank ", rank, " |");
    for (const std::string& cell : row) absl::StrAppend(&line, " ", cell, std::string(width - std::min(width, cell.size()), ' '));
    line.erase(line.find_last_not_of(' ') + 1);
    absl::StrAppend(&picture, line, "\n");
  }
  return picture;
}

std::string Picture(const ScheduleShape& s) {
  const std::vector<Program> programs = Lowered(s);
  absl::StatusOr<Simulation> run = Simulate(programs, WorkOf(s), {});
  EXPECT_TRUE(run.ok()) << run.status();
  std::string text = absl::StrCat(Name(s), "\n\nOne unit per forward and backward:\n", DrawTimeline(programs, *run), "\nPrograms:\n");
  for (size_t rank = 0; rank < programs.size(); ++rank) absl::StrAppend(&text, "rank ", rank, " | ", FormatProgram(programs[rank]), "\n");
  absl::StrAppend(&text, "\nbubble ", static_cast<int>(run->bubble_ratio * 1000 + 0.5) / 10.0, " %\n");
  for (int rank = 0; rank < s.pipeline_size; ++rank) absl::StrAppend(&text, "rank ", rank, " holds at most ", run->peak_activations[rank], " activations\n");
  for (const ChannelUse& use : run->channels) {
    absl::StrAppend(&text, use.gradients ? "gradients " : "activations ", use.from, " -> ", use.to, ": ", use.num_messages, " messages, ", use.peak_posted,
                    use.peak_posted == 1 ? " receive buffer\n" : " receive buffers\n");
  }
  return text;
}

// PPFT_UPDATE_GOLDENS=1 writes the files anew; read the difference before committing it.
TEST(GoldenTest, SchedulesLookAsDrawn) {
  const std::vector<std::pair<std::string, ScheduleShape>> cases = {{"gpipe_p2_m4", {ScheduleKind::kGPipe, 2, 1, 4}},
                                                                    {"gpipe_p4_m4", {ScheduleKind::kGPipe, 4, 1, 4}},
                                                                    {"1f1b_p1_m3", {ScheduleKind::k1F1B, 1, 1, 3}},
                                                                    {"1f1b_p2_m4", {ScheduleKind::k1F1B, 2, 1, 4}},
                                                                    {"1f1b_p4_m8", {ScheduleKind::k1F1B, 4, 1, 8}},
                                                                    {"1f1b_p4_m2", {ScheduleKind::k1F1B, 4, 1, 2}},
                                                                    {"interleaved_p2_v2_m4", {ScheduleKind::kInterleaved1F1B, 2, 2, 4}},
                                                                    {"interleaved_p2_v2_m5", {ScheduleKind::kInterleaved1F1B, 2, 2, 5}},
                                                                    {"interleaved_p4_v2_m8", {ScheduleKind::kInterleaved1F1B, 4, 2, 8}}};
  for (const auto& [name, shape] : cases) {
    const std::string path = absl::StrCat("tests/golden/pipeline/", name, ".txt");
    const std::string text = Picture(shape);
    if (std::getenv("PPFT_UPDATE_GOLDENS") != nullptr) std::ofstream(path) << text;
    std::ifstream file(path);
    std::stringstream golden;
    golden << file.rdbuf();
    EXPECT_EQ(text, golden.str()) << path;
  }
}

}  // namespace
}  // namespace ppft::pipeline
