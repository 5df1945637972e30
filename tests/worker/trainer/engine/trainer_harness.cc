// Stands in for the agents of one job: starts a ppft-trainer per rank, hands each its Start and the peers, and prints every report as a JSON line
// {"rank": 0, "report": {…}}. Ends with the trainers: 0 if all ended with 0, 1 otherwise; a last line {"exits": […]} tells how.
//
//   trainer_harness START_JSON DIRECTORY [--dp N] [--pp N] [--virtual N] [--schedule NAME] [--layers N] [--kill_rank R --kill_at_step S]
//
// START_JSON is a Start without rank, directory, beat path and the plan's stages and ranks: those are made here. The layers are cut evenly.
#include <fcntl.h>
#include <google/protobuf/util/json_util.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/pipeline/lowering.h"
#include "common/pipeline/mesh.h"
#include "common/pipeline/schedule.h"
#include "ppft/v1/trainer.pb.h"
#include "worker/trainer/beat.h"

namespace {

using ppft::pipeline::Mesh;
using ppft::pipeline::Program;
namespace v1 = ppft::v1;

[[noreturn]] void Die(const std::string& text) {
  std::fprintf(stderr, "trainer_harness: %s\n", text.c_str());
  std::exit(2);
}

void FillPlan(const Mesh& mesh, const std::string& schedule, int layers, v1::Plan* plan) {
  ppft::pipeline::ScheduleShape shape;
  const auto kind = ppft::pipeline::ParseScheduleKind(schedule);
  if (!kind.ok()) Die(kind.status().ToString());
  shape.kind = *kind;
  shape.pipeline_size = mesh.pipeline_size;
  shape.virtual_stages = mesh.virtual_stages;
  const int per_pass = std::max(1, plan->microbatches_per_pass());
  shape.num_microbatches = (plan->num_microbatches() + per_pass - 1) / per_pass;
  const auto compute = ppft::pipeline::BuildSchedule(shape);
  if (!compute.ok()) Die(compute.status().ToString());
  const auto programs = ppft::pipeline::Lower(*compute, mesh.num_stages());
  if (!programs.ok()) Die(programs.status().ToString());
  plan->set_data_parallel_size(mesh.data_parallel_size);
  plan->set_pipeline_parallel_size(mesh.pipeline_size);
  plan->set_virtual_stages(mesh.virtual_stages);
  plan->set_schedule(schedule);
  for (int stage = 0; stage < mesh.num_stages(); ++stage) {
    v1::StagePlan* out = plan->add_stages();
    const int first = layers * stage / mesh.num_stages();
    out->set_stage(stage);
    out->set_first_layer(first);
    out->set_num_layers(layers * (stage + 1) / mesh.num_stages() - first);
    out->set_has_embedding(stage == 0);
    out->set_has_head(stage + 1 == mesh.num_stages());
  }
  for (int rank = 0; rank < mesh.num_ranks(); ++rank) {
    v1::RankPlan* out = plan->add_ranks();
    out->set_rank(rank);
    out->set_replica(mesh.ReplicaOf(rank));
    out->set_pipeline_rank(mesh.PipelineRankOf(rank));
    for (const int stage : mesh.StagesOf(rank)) out->add_stages(stage);
    out->set_program(FormatProgram((*programs)[mesh.PipelineRankOf(rank)]));
  }
}

struct Child {
  pid_t pid = -1;
  int fd = -1;
  int status = 0;
  bool open = true;
};

Child Spawn(const std::string& binary) {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) Die("socketpair");
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (fds[1] == 3) {
      fcntl(3, F_SETFD, 0);
    } else {
      dup2(fds[1], 3);
    }
    execl(binary.c_str(), binary.c_str(), "--device", "", nullptr);  // of no worker
    _exit(127);
  }
  close(fds[1]);
  return {pid, fds[0]};
}

bool ReadAll(int fd, char* data, size_t size) {
  while (size > 0) {
    const ssize_t n = read(fd, data, size);
    if (n <= 0) return false;
    data += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

void SendMessage(int fd, const v1::AgentMessage& message) {
  const std::string bytes = message.SerializeAsString();
  const auto size = static_cast<uint32_t>(bytes.size());
  std::string frame(reinterpret_cast<const char*>(&size), sizeof(size));
  frame += bytes;
  // A trainer that is gone shows when its end is read.
  [[maybe_unused]] const absl::Status ignored = ppft::WriteAll(fd, frame, "trainer");
}

bool ReceiveReport(int fd, v1::TrainerReport* report) {
  uint32_t size = 0;
  if (!ReadAll(fd, reinterpret_cast<char*>(&size), sizeof(size))) return false;
  std::string bytes(size, '\0');
  return ReadAll(fd, bytes.data(), size) && report->ParseFromString(bytes);
}

void Print(int rank, const v1::TrainerReport& report) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  if (!google::protobuf::util::MessageToJsonString(report, &json, options).ok()) Die("a report is no JSON");
  std::printf("{\"rank\": %d, \"report\": %s}\n", rank, json.c_str());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) Die("usage: trainer_harness START_JSON DIRECTORY [--flag value]…");
  signal(SIGPIPE, SIG_IGN);
  std::map<std::string, std::string> flags = {{"--dp", "1"},     {"--pp", "1"},         {"--virtual", "1"},      {"--schedule", "1f1b"},
                                              {"--layers", "5"}, {"--kill_rank", "-1"}, {"--kill_at_step", "-1"}};
  for (int i = 3; i + 1 < argc; i += 2) {
    if (flags.count(argv[i]) == 0) Die(absl::StrCat("unknown flag ", argv[i]));
    flags[argv[i]] = argv[i + 1];
  }
  const auto number = [&](const char* name) { return std::atoi(flags[name].c_str()); };
  const auto text = ppft::ReadFile(argv[1]);
  if (!text.ok()) Die(text.status().ToString());
  v1::Start start;
  const auto parsed = google::protobuf::util::JsonStringToMessage(*text, &start);
  if (!parsed.ok()) Die(std::string(parsed.message()));
  const Mesh mesh{number("--dp"), number("--pp"), number("--virtual")};
  FillPlan(mesh, flags["--schedule"], number("--layers"), start.mutable_plan());

  std::string self(4096, '\0');
  self.resize(static_cast<size_t>(readlink("/proc/self/exe", self.data(), self.size())));
  const std::string binary = self.substr(0, self.rfind('/')) + "/../bin/ppft-trainer";
  std::vector<Child> children;
  for (int rank = 0; rank < mesh.num_ranks(); ++rank) {
    const std::string directory = ppft::JoinPath(argv[2], absl::StrCat("rank-", rank));
    if (!ppft::MakeDirs(directory).ok()) Die("mkdir " + directory);
    v1::AgentMessage message;
    *message.mutable_start() = start;
    message.mutable_start()->set_rank(rank);
    message.mutable_start()->set_directory(directory);
    message.mutable_start()->set_beat_path(directory + ".beat");
    if (!ppft::WriteFileAtomic(directory + ".beat", std::string(ppft::trainer::kBeatBytes, '\0')).ok()) Die("write " + directory + ".beat");
    children.push_back(Spawn(binary));
    SendMessage(children.back().fd, message);
  }

  v1::AgentMessage peers;
  size_t open = children.size();
  while (open > 0) {
    std::vector<struct pollfd> entries;
    for (const Child& child : children) entries.push_back({child.open ? child.fd : -1, POLLIN, 0});
    if (poll(entries.data(), entries.size(), -1) < 0) continue;
    for (size_t rank = 0; rank < children.size(); ++rank) {
      if (entries[rank].revents == 0) continue;
      Child& child = children[rank];
      v1::TrainerReport report;
      if (!ReceiveReport(child.fd, &report)) {
        child.open = false;
        --open;
        waitpid(child.pid, &child.status, 0);
        continue;
      }
      Print(static_cast<int>(rank), report);
      if (report.has_listening()) {
        v1::Endpoint* endpoint = peers.mutable_peers()->add_endpoints();
        endpoint->set_rank(static_cast<int>(rank));
        endpoint->set_address(report.listening().address());
        if (peers.peers().endpoints_size() == mesh.num_ranks()) {
          for (const Child& peer : children) SendMessage(peer.fd, peers);
        }
      }
      if (report.has_step() && report.step().row().step() == number("--kill_at_step")) kill(children[static_cast<size_t>(number("--kill_rank"))].pid, SIGKILL);
    }
  }
  int worst = 0;
  std::string exits;
  for (const Child& child : children) {
    const int code = WIFEXITED(child.status) ? WEXITSTATUS(child.status) : -WTERMSIG(child.status);
    if (code != 0) worst = 1;
    absl::StrAppend(&exits, exits.empty() ? "" : ", ", code);
  }
  std::printf("{\"exits\": [%s]}\n", exits.c_str());
  return worst;
}
