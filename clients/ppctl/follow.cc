#include "clients/ppctl/follow.h"

#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/ppctl/format.h"
#include "common/base/status.h"
#include "common/net/channel.h"
#include "common/net/status.h"

namespace ppft::ctl {
namespace {

constexpr absl::Duration kStreamTime = absl::Hours(1);  // then the stream is opened anew
constexpr int kMaxOddErrors = 5;                        // errors that are no plain loss of connection, in a row without news

// Ends a blocking read soon after Ctrl-C.
class CancelOnInterrupt {
 public:
  explicit CancelOnInterrupt(grpc::ClientContext* context)
      : thread_([this, context] {
          while (!done_ && !Interrupted()) absl::SleepFor(absl::Milliseconds(50));
          if (!done_) context->TryCancel();
        }) {}
  ~CancelOnInterrupt() {
    done_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> done_{false};
  std::thread thread_;
};

class Follower {
 public:
  Follower(Context& context, std::string id) : context_(context), id_(std::move(id)) {}

  Result Run() {
    net::Backoff backoff(absl::Milliseconds(250), absl::Seconds(5));
    int odd_errors = 0;
    while (!ended_) {
      const int64_t before = seq_;
      const absl::Status status = Stream();
      if (Interrupted()) return Detached();
      if (ended_) break;
      if (seq_ != before) {
        backoff.Reset();
        odd_errors = 0;
      }
      if (absl::IsNotFound(status) || absl::IsInvalidArgument(status) || absl::IsPermissionDenied(status) || absl::IsUnauthenticated(status) ||
          absl::IsUnimplemented(status)) {
        ClearBar();
        return status;
      }
      const bool plain = status.ok() || net::IsRetryable(status) || absl::IsCancelled(status);
      if (!plain && ++odd_errors >= kMaxOddErrors) {
        ClearBar();
        return status;
      }
      if (!status.ok() && !absl::IsDeadlineExceeded(status)) Lost();
      Pause(backoff.Next());
      if (Interrupted()) return Detached();
    }
    ClearBar();
    context_.err() << EndText(job_) << std::endl;
    if (context_.format == Format::kJson || context_.format == Format::kYaml) context_.PrintMessage(job_);
    return job_.status().state() == v1::JOB_STATE_SUCCEEDED ? kOk : kJobFailed;
  }

 private:
  absl::Status Stream() {
    grpc::ClientContext call;
    net::SetDeadline(&call, kStreamTime);
    CancelOnInterrupt cancel(&call);
    v1::WatchJobRequest request;
    request.set_id(id_);
    request.set_after_seq(seq_);
    auto stream = context_.jobs()->WatchJob(&call, request);
    v1::WatchJobResponse response;
    while (stream->Read(&response)) News(response.job());
    return net::StatusFromGrpc(stream->Finish());
  }

  void News(const v1::Job& job) {
    if (lost_) {
      lost_ = false;
      ClearBar();
      context_.err() << "connected again to " << context_.server << std::endl;
    }
    job_ = job;
    seq_ = std::max(seq_, job.seq());
    ended_ = IsTerminal(job.status().state());
    const auto line = lines_.Next(job, absl::Now());
    if (context_.terminal().err_is_terminal) {
      // A state that is left stays on the screen as a line of its own.
      if (bar_state_ != job.status().state() && bar_state_ != v1::JOB_STATE_UNSPECIFIED) context_.err() << "\n";
      bar_state_ = job.status().state();
      context_.err() << "\r\x1b[K" << BarLine(job, context_.terminal().width - 1) << std::flush;
    } else if (line) {
      context_.err() << *line << std::endl;
    }
  }

  void Lost() {
    if (lost_) return;
    lost_ = true;
    ClearBar();
    context_.err() << "lost the connection to " << context_.server << "; trying again until it is back (the job goes on; Ctrl-C stops waiting)" << std::endl;
  }

  Result Detached() {
    ClearBar();
    context_.err() << "detached: " << id_ << " goes on. Follow it again with: ppctl watch " << id_ << "   Stop it with: ppctl cancel " << id_ << std::endl;
    return kInterrupted;
  }

  void ClearBar() {
    if (context_.terminal().err_is_terminal) context_.err() << "\r\x1b[K" << std::flush;
  }

  static void Pause(absl::Duration duration) {
    for (const absl::Time end = absl::Now() + duration; absl::Now() < end && !Interrupted();) absl::SleepFor(absl::Milliseconds(50));
  }

  Context& context_;
  const std::string id_;
  int64_t seq_ = 0;
  bool ended_ = false, lost_ = false;
  v1::Job job_;
  ProgressLines lines_;
  v1::JobState bar_state_ = v1::JOB_STATE_UNSPECIFIED;
};

}  // namespace

std::optional<std::string> ProgressLines::Next(const v1::Job& job, absl::Time now) {
  std::string line = StatusLine(job);
  const bool new_state = job.status().state() != state_;
  if (line == line_ || (!new_state && now - printed_ < absl::Seconds(1))) return std::nullopt;
  state_ = job.status().state();
  printed_ = now;
  line_ = line;
  return line;
}

std::string EndText(const v1::Job& job) {
  const v1::JobStatus& status = job.status();
  std::string took;
  if (job.has_start_time() && job.has_end_time()) took = absl::StrCat(" after ", ShortDuration(ToTime(job.end_time()) - ToTime(job.start_time())));
  std::string text = absl::StrCat(job.id(), " ", StateWord(status.state()), took, status.step() > 0 ? absl::StrCat(" at step ", status.step()) : "");
  if (status.state() == v1::JOB_STATE_SUCCEEDED) {
    if (status.has_loss()) absl::StrAppend(&text, ", loss ", FormatLoss(status.loss()));
    if (status.has_first_eval_loss() && status.has_best_metric()) {
      absl::StrAppend(&text, ", eval_loss ", FormatLoss(status.first_eval_loss()), " -> ", FormatLoss(status.best_metric()));
    }
    return absl::StrCat(text, ". Get the result with: ppctl fetch ", job.id());
  }
  const v1::Reason& reason = status.reason();
  const std::string why = reason.code().empty() ? reason.message() : absl::StrCat(reason.code(), ": ", reason.message());
  if (!reason.message().empty() || !reason.code().empty()) absl::StrAppend(&text, "\n", Printable(why));
  if (!reason.remedy().empty()) absl::StrAppend(&text, "\nWhat to do: ", Printable(reason.remedy()));
  return text;
}

Result Follow(Context& context, const std::string& job) { return Follower(context, job).Run(); }

}  // namespace ppft::ctl
