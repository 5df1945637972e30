// One ppft-trainer child: fork, frames over a socketpair, end. The child dies with the agent (PR_SET_PDEATHSIG).
//
// Thread: Start and Wait on one thread that outlives the child (the kernel ties the death signal to it); Send and Kill from any.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/files.h"
#include "ppft/v1/trainer.pb.h"

namespace ppft::agent {

struct TrainerCommand {
  std::string binary;
  std::string directory;                 // working directory; stderr goes to DIRECTORY/stderr.log
  std::vector<std::string> environment;  // "NAME=value", on top of the agent's own
  std::vector<std::string> arguments;
};

class TrainerProcess {
 public:
  TrainerProcess() = default;
  ~TrainerProcess();
  TrainerProcess(const TrainerProcess&) = delete;
  TrainerProcess& operator=(const TrainerProcess&) = delete;

  absl::Status Start(const TrainerCommand& command);
  // Never blocks: what the child does not take at once goes out, in order, while Receive waits.
  absl::Status Send(const v1::AgentMessage& message);
  // Blocks. OUT_OF_RANGE when the child has closed its end; DATA_LOSS for a broken frame.
  absl::StatusOr<v1::TrainerReport> Receive();
  // Blocks until the child is gone.
  v1::Exited Wait();
  void Kill(int signal);
  // A signal (SIGSTOP) or a debugger holds the child: it cannot run until somebody lets it.
  bool stopped();
  bool alive() const { return pid_ > 0; }

 private:
  static constexpr uint32_t kMaxFrameBytes = 64 << 20;

  absl::Status ReadExactly(char* data, size_t size, bool at_frame_start);
  // Until there is something to read, or the end.
  absl::Status AwaitInput();
  // With send_mutex_ held: as much as the socket takes.
  absl::Status Flush();

  std::string directory_;
  Fd socket_;
  Fd wake_;  // an eventfd: unsent_ is not empty any more
  std::mutex send_mutex_;
  std::string unsent_;  // guarded by send_mutex_
  std::mutex pid_mutex_;
  std::atomic<pid_t> pid_ = 0;  // written under pid_mutex_, so that a signal never hits a reused pid
};

}  // namespace ppft::agent
