// ppft-trainer: one rank of a job. Started by ppft-worker with a socket on descriptor 3; everything else comes through that.
#include <ATen/Parallel.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "worker/trainer/beat.h"
#include "worker/trainer/comm/tcp_transport.h"
#include "worker/trainer/control.h"
#include "worker/trainer/engine/failure.h"
#include "worker/trainer/engine/trainer.h"

namespace ppft::trainer {
namespace {

constexpr int kControlFd = 3;

absl::Status Work(Control& control, std::unique_ptr<Trainer>& trainer) {
  PPFT_ASSIGN_OR_RETURN(TrainerConfig config, control.AwaitStart());
  control.SetSource(absl::StrCat("rank-", config.rank));
  at::set_num_threads(config.plan.threads_per_rank);
  Beat* beat = config.beat_path.empty() ? nullptr : MapBeat(config.beat_path);
  if (beat != nullptr) beat->magic.store(kBeatMagic);
  PPFT_ASSIGN_OR_RETURN(TcpListener listener, TcpListener::Open(config.listen_address));
  control.Listening(listener.address());
  trainer = std::make_unique<Trainer>(std::move(config), &control, beat);
  PPFT_RETURN_IF_ERROR(trainer->Load());
  PPFT_ASSIGN_OR_RETURN(const std::vector<std::string> endpoints, control.AwaitPeers());
  PPFT_RETURN_IF_ERROR(trainer->Connect(std::move(listener), endpoints));
  return trainer->Run();
}

int Main() {
  SetLogComponent("trainer");
  signal(SIGPIPE, SIG_IGN);
  int type = 0;
  socklen_t size = sizeof(type);
  if (getsockopt(kControlFd, SOL_SOCKET, SO_TYPE, &type, &size) != 0) {
    std::fprintf(stderr, "ppft-trainer is started by ppft-worker, with a socket on descriptor %d\n", kControlFd);
    return 2;
  }
  Control control{Fd(kControlFd)};
  std::unique_ptr<Trainer> trainer;
  const absl::Status status = Work(control, trainer);
  if (!status.ok()) {
    const int64_t step = trainer == nullptr ? 0 : trainer->step();
    control.Log(Severity::kError, std::string(status.message()));
    control.Failed(DescribeFailure(status, step));
    if (trainer != nullptr) trainer->Abort(status);
  }
  // No destructors: threads may still hold buffers, and everything that matters is on disk or sent.
  std::fflush(stderr);
  _exit(status.ok() ? 0 : 1);
}

}  // namespace
}  // namespace ppft::trainer

int main() { return ppft::trainer::Main(); }
