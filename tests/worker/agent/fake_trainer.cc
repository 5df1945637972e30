// Speaks the trainer's side of the control socket without training: the job's name says how it behaves.
//   "steps"  reports 3 steps and one checkpoint file, finishes, exits 0
//   "wait"   becomes ready and goes on beating for ever
//   "hang"   becomes ready and stops beating
//   "await"  becomes ready and waits for its peers' export without a beat
//   "trace"  becomes ready and answers the trace that it is told to make
//   "count"  becomes ready and answers each trace that it is told to make
//   "big"    exports with more numbers than a message holds, exits 0
//   "deaf"   reads nothing, not even its Start, as if its device's driver held it
//   "crash"  becomes ready and dies by SIGABRT after a line on stderr
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/base/files.h"
#include "common/base/sha256.h"
#include "ppft/v1/trainer.pb.h"
#include "worker/trainer/beat.h"

namespace {

constexpr int kSocket = 3;

bool ReadAll(char* data, size_t size) {
  while (size > 0) {
    const ssize_t got = read(kSocket, data, size);
    if (got <= 0) return false;
    data += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

ppft::v1::AgentMessage Receive() {
  uint32_t size = 0;
  if (!ReadAll(reinterpret_cast<char*>(&size), sizeof(size))) _exit(0);
  std::string body(size, '\0');
  if (!ReadAll(body.data(), size)) _exit(0);
  ppft::v1::AgentMessage message;
  if (!message.ParseFromString(body)) _exit(9);
  return message;
}

void Send(const ppft::v1::TrainerReport& report) {
  const std::string body = report.SerializeAsString();
  const uint32_t size = static_cast<uint32_t>(body.size());
  std::string frame(reinterpret_cast<const char*>(&size), sizeof(size));
  if (!ppft::WriteAll(kSocket, frame + body, "socket").ok()) _exit(0);
}

}  // namespace

int main() {
  // The only name that is known without reading: the working directory has the job's id in it.
  char directory[4096];
  if (getcwd(directory, sizeof(directory)) != nullptr && std::strstr(directory, "/job-deaf-") != nullptr) {
    while (true) pause();
  }
  const ppft::v1::Start start = Receive().start();
  ppft::trainer::Beat* beat = ppft::trainer::MapBeat(start.beat_path());
  ppft::v1::TrainerReport report;
  report.mutable_listening()->set_address(start.listen_address() + ":" + std::to_string(getpid()));
  Send(report);
  if (Receive().peers().endpoints_size() == 0) return 8;
  report.mutable_ready();
  Send(report);
  const std::string& behaviour = start.spec().name();
  if (behaviour == "crash") {
    std::fputs("the last words \xff\n", stderr);
    std::fflush(stderr);
    signal(SIGABRT, SIG_DFL);
    std::abort();
  }
  if (behaviour == "hang") {
    ppft::trainer::WriteBeat(beat, ppft::trainer::Section::kForward, 7, 0);
    while (true) pause();
  }
  if (behaviour == "await") {
    ppft::trainer::WriteBeat(beat, ppft::trainer::Section::kAwaitExport, 7, 0);
    while (true) pause();
  }
  while (behaviour == "count") {
    report.mutable_trace()->set_id(Receive().trace().id());
    Send(report);
  }
  if (behaviour == "trace") {
    report.mutable_trace()->set_id(Receive().trace().id());
    Send(report);
    while (true) Receive();
  }
  if (behaviour == "wait") {
    while (true) {
      ppft::trainer::WriteBeat(beat, ppft::trainer::Section::kForward, 1, 0);
      usleep(20000);
    }
  }
  if (behaviour == "big") {
    ppft::v1::Verification* verification = report.mutable_exported()->add_verifications();
    for (int i = 0; i < 2 << 20; ++i) verification->add_last_logits(0.5f);
    Send(report);
    return 0;
  }
  for (int step = 1; step <= 3; ++step) {
    report.mutable_step()->mutable_row()->set_step(step);
    Send(report);
  }
  const std::string content = "checkpoint of " + start.job_id();
  const std::string path = start.directory() + "/rank-0.safetensors";
  if (!ppft::WriteFileAtomic(path, content).ok()) return 7;
  ppft::v1::LocalFile* file = report.mutable_checkpoint()->add_files();
  file->set_path(path);
  file->mutable_content()->set_name("rank-0.safetensors");
  file->mutable_content()->set_sha256(ppft::Sha256Hex(content));
  file->mutable_content()->set_size_bytes(static_cast<int64_t>(content.size()));
  Send(report);
  report.mutable_finished()->set_reason("max_steps");
  Send(report);
  return 0;
}
