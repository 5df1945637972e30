// list, get, watch, cancel, events, logs, metrics, checkpoints.
#include <algorithm>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/follow.h"
#include "clients/ppctl/format.h"
#include "clients/ppctl/plot.h"
#include "common/base/format.h"
#include "common/base/status.h"
#include "common/net/channel.h"
#include "common/net/status.h"
#include "common/spec/suggest.h"

namespace ppft::ctl {
namespace {

constexpr size_t kPlotRows = 16;

std::string Time(const google::protobuf::Timestamp& time) { return FormatTime(time, absl::LocalTimeZone()); }

// "running" or, as -o json writes it, "JOB_STATE_RUNNING".
absl::StatusOr<v1::JobState> ParseState(const std::string& written) {
  constexpr absl::string_view kPrefix = "JOB_STATE_";
  const std::string word = absl::StartsWithIgnoreCase(written, kPrefix) ? written.substr(kPrefix.size()) : written;
  std::vector<std::string> words;
  for (int i = 1; i <= v1::JobState_MAX; ++i) {
    words.push_back(StateWord(static_cast<v1::JobState>(i)));
    if (absl::EqualsIgnoreCase(words.back(), word)) return static_cast<v1::JobState>(i);
  }
  const std::string nearest = spec::Nearest(word, words);
  return absl::InvalidArgumentError(absl::StrCat("\"", written, "\" is not a state", nearest.empty() ? "." : absl::StrCat("; did you mean ", nearest, "?"),
                                                 " The states are ", absl::StrJoin(words, ", ")));
}

absl::StatusOr<v1::Job> FindJob(Context& context, const std::string& id) {
  v1::GetJobRequest request;
  request.set_id(id);
  v1::Job job;
  PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::GetJob, request, &job));
  return job;
}

void PrintJob(Context& context, const v1::Job& job) {
  const v1::JobStatus& status = job.status();
  std::vector<std::vector<std::string>> rows = {{"id", job.id()}, {"name", job.name()}, {"state", StateWord(status.state())}};
  const auto add = [&](const char* name, const std::string& value) {
    if (!value.empty()) rows.push_back({name, value});
  };
  add("reason", ReasonText(status.reason()));
  if (status.queue_position() > 0) add("queue position", absl::StrCat(status.queue_position()));
  add("model", job.spec().model().base_model());
  if (status.step() > 0 || status.total_steps() > 0) add("progress", StepText(status));
  if (status.step() > 0) {
    add("epoch", absl::StrFormat("%.2f", status.epoch()));
    add("tokens", absl::StrCat(FormatCount(static_cast<double>(status.tokens_seen())), " seen, ", FormatCount(static_cast<double>(status.supervised_tokens())),
                               " supervised"));
  }
  if (status.has_first_eval_loss()) add("first eval_loss", FormatLoss(status.first_eval_loss()));
  if (status.has_best_metric()) add("best eval_loss", absl::StrCat(FormatLoss(status.best_metric()), " at step ", status.best_step()));
  if (status.checkpoint_step() > 0) add("checkpoint", absl::StrCat("step ", status.checkpoint_step()));
  if (status.restarts() > 0) add("restarts", absl::StrCat(status.restarts()));
  add("schedule", status.schedule());
  if (status.microbatches_per_pass() > 1) add("micro-batches", absl::StrCat(status.microbatches_per_pass(), " in a pass"));
  const bool replicated = std::any_of(status.assignment().begin(), status.assignment().end(), [](const auto& at) { return at.replica() > 0; });
  for (const auto& at : status.assignment()) {
    const std::string name = absl::StrCat("stage ", at.stage(), replicated ? absl::StrCat(" replica ", at.replica()) : "");
    add(name.c_str(), absl::StrCat(at.worker(), " ", at.device(), at.layers().empty() ? "" : absl::StrCat(", layers ", at.layers())));
  }
  add("created", Time(job.create_time()));
  if (job.has_start_time()) add("started", Time(job.start_time()));
  if (job.has_end_time()) add("ended", Time(job.end_time()));
  context.out() << FormatTable(rows);
}

template <typename Request, typename Row>
using StreamMethod = std::unique_ptr<grpc::ClientReaderInterface<Row>> (v1::JobService::StubInterface::*)(grpc::ClientContext*, const Request&);

// Prints a job's stream of rows with seq to its end; with `follow` over lost connections too. `text`: a row as one line for people.
template <typename Request, typename Row>
Result PrintStream(Context& context, const std::string& id, bool follow, StreamMethod<Request, Row> method, std::string (*text)(const Row&)) {
  PPFT_ASSIGN_OR_RETURN(const v1::Job job, FindJob(context, id));
  Request request;
  request.set_job_id(job.id());
  request.set_follow(follow);
  net::Backoff backoff(absl::Milliseconds(250), absl::Seconds(5));
  bool told = false;
  for (const absl::Time start = absl::Now();;) {
    grpc::ClientContext call;
    net::SetDeadline(&call, follow ? absl::Hours(1) : std::max(context.timeout, absl::Minutes(5)));
    const auto stream = (context.jobs()->*method)(&call, request);
    Row row;
    while (stream->Read(&row)) {
      request.set_after_seq(std::max(request.after_seq(), row.seq()));
      backoff.Reset();
      told = false;
      context.Reached();
      if (context.format == Format::kJson) {
        context.out() << ToJson(row, false);
      } else if (context.format == Format::kYaml) {
        context.out() << "---\n" << ToYamlText(row);
      } else {
        context.out() << text(row) << "\n";
      }
      context.out().flush();
    }
    const absl::Status status = net::StatusFromGrpc(stream->Finish());
    if (status.ok()) return kOk;
    const bool again = net::IsRetryable(status) && context.reached() && (follow || absl::Now() - start < context.timeout);
    if (!again) return context.Explain(status);
    if (!told && absl::IsUnavailable(status)) context.err() << "lost the connection to " << context.server << "; trying again" << std::endl;
    told = true;
    absl::SleepFor(backoff.Next());
  }
}

std::string EventText(const v1::Event& event) {
  const std::string move = event.from() == event.to() ? "" : absl::StrCat("-> ", StateWord(event.to()), "  ");
  const std::string step = event.step() > 0 ? absl::StrCat("step ", event.step(), "  ") : "";
  return absl::StrCat(Time(event.time()), "  ", absl::StrFormat("%-12s", event.actor()), "  ", move, step, ReasonText(event.reason()));
}

std::string LogText(const v1::LogLine& line) {
  return absl::StrCat(Time(line.time()), "  ", line.source(), "  ", line.severity() == "INFO" ? "" : absl::StrCat(line.severity(), "  "),
                      Printable(line.text()));
}

std::string Optional(bool has, double value) { return has ? FormatLoss(value) : "-"; }

}  // namespace

Result ListJobs(Context& context, const ListOptions& options) {
  v1::ListJobsRequest request;
  for (const std::string& word : options.states) {
    PPFT_ASSIGN_OR_RETURN(const v1::JobState state, ParseState(word));
    request.add_states(state);
  }
  for (const std::string& label : options.labels) {
    const std::vector<std::string> pair = absl::StrSplit(label, absl::MaxSplits('=', 1));
    if (pair.size() != 2 || pair[0].empty()) return absl::InvalidArgumentError(absl::StrCat("\"", label, "\" is not a label: use --label KEY=VALUE"));
    (*request.mutable_labels())[pair[0]] = pair[1];
  }
  v1::ListJobsResponse all;
  PPFT_RETURN_IF_ERROR(context.CallPages(context.jobs(), &v1::JobService::StubInterface::ListJobs, request, &all));
  if (context.PrintMessage(all)) return kOk;
  std::vector<std::vector<std::string>> rows = {{"ID", "NAME", "STATE", "PROGRESS", "CREATED"}};
  for (const v1::Job& job : all.jobs()) {
    if (context.format == Format::kName) context.out() << job.id() << "\n";
    const v1::JobStatus& status = job.status();
    std::string progress = status.step() > 0 || status.total_steps() > 0 ? StepText(status)
                           : status.queue_position() > 0                 ? absl::StrCat("position ", status.queue_position())
                                                                         : "-";
    const bool paused = status.state() == v1::JOB_STATE_PAUSED && !status.reason().code().empty();
    const std::string state = StateWord(status.state());
    rows.push_back({job.id(), job.name(), paused ? absl::StrCat(state, "(", status.reason().code(), ")") : state, progress, Time(job.create_time())});
  }
  if (context.format == Format::kTable) {
    if (all.jobs().empty()) {
      context.err() << "no jobs\n";
    } else {
      context.out() << FormatTable(rows);
    }
  }
  return kOk;
}

Result GetJob(Context& context, const std::string& id) {
  PPFT_ASSIGN_OR_RETURN(const v1::Job job, FindJob(context, id));
  if (context.format == Format::kName) {
    context.out() << job.id() << "\n";
  } else if (!context.PrintMessage(job)) {
    PrintJob(context, job);
  }
  return kOk;
}

Result WatchJob(Context& context, const std::string& id) {
  PPFT_ASSIGN_OR_RETURN(const v1::Job job, FindJob(context, id));
  return Follow(context, job.id());
}

Result CancelJob(Context& context, const std::string& id) {
  v1::CancelJobRequest request;
  request.set_request_id(NewRequestId());
  request.set_id(id);
  v1::Job job;
  PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::CancelJob, request, &job));
  if (context.format == Format::kName) {
    context.out() << job.id() << "\n";
  } else if (!context.PrintMessage(job)) {
    context.out() << job.id() << " " << StateWord(job.status().state()) << "\n";
  }
  return kOk;
}

Result Events(Context& context, const std::string& id, bool follow) {
  return PrintStream(context, id, follow, &v1::JobService::StubInterface::StreamEvents, EventText);
}

Result Logs(Context& context, const std::string& id, bool follow) {
  return PrintStream(context, id, follow, &v1::JobService::StubInterface::StreamLogs, LogText);
}

Result Metrics(Context& context, const MetricsOptions& options) {
  PPFT_ASSIGN_OR_RETURN(const v1::Job job, FindJob(context, options.job));
  v1::GetMetricsRequest request;
  request.set_job_id(job.id());
  request.set_after_step(-1);
  v1::GetMetricsResponse all;
  for (;;) {
    v1::GetMetricsResponse page;
    PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::GetMetrics, request, &page));
    if (page.rows().empty()) break;
    all.MergeFrom(page);
    if (page.rows(page.rows_size() - 1).step() <= request.after_step()) break;
    request.set_after_step(page.rows(page.rows_size() - 1).step());
  }
  if (context.PrintMessage(all)) return kOk;
  if (options.plot) {
    std::vector<Curve> curves = {{"loss", {}}, {"eval_loss", {}}};
    for (const v1::MetricRow& row : all.rows()) {
      if (row.has_loss()) curves[0].points.push_back({static_cast<double>(row.step()), row.loss()});
      if (row.has_eval_loss()) curves[1].points.push_back({static_cast<double>(row.step()), row.eval_loss()});
    }
    const std::string plot = Plot(curves, context.terminal().width, kPlotRows);
    if (plot.empty()) context.err() << job.id() << " has no steps yet\n";
    context.out() << plot;
    return kOk;
  }
  std::vector<std::vector<std::string>> rows = {{"STEP", "EPOCH", "LOSS", "EVAL_LOSS", "LEARNING_RATE", "GRAD_NORM", "TOKENS/S"}};
  for (const v1::MetricRow& row : all.rows()) {
    rows.push_back({absl::StrCat(row.step(), row.skipped() ? " skipped" : ""), absl::StrFormat("%.3f", row.epoch()), Optional(row.has_loss(), row.loss()),
                    Optional(row.has_eval_loss(), row.eval_loss()), Optional(row.has_learning_rate(), row.learning_rate()),
                    Optional(row.has_grad_norm(), row.grad_norm()), row.tokens_per_second() > 0 ? FormatCount(row.tokens_per_second()) : "-"});
  }
  context.out() << FormatTable(rows);
  return kOk;
}

Result Checkpoints(Context& context, const std::string& id) {
  PPFT_ASSIGN_OR_RETURN(const v1::Job job, FindJob(context, id));
  v1::ListCheckpointsRequest request;
  request.set_job_id(job.id());
  v1::ListCheckpointsResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.artifacts(), &v1::ArtifactService::StubInterface::ListCheckpoints, request, &response));
  if (context.PrintMessage(response)) return kOk;
  // Each was marked when it was written; only the newest mark still holds.
  int64_t best_step = -1;
  for (const v1::CheckpointManifest& checkpoint : response.checkpoints()) best_step = checkpoint.best() ? checkpoint.state().step() : best_step;
  std::vector<std::vector<std::string>> rows = {{"STEP", "EVAL_LOSS", "BEST", "SIZE", "CREATED", "STATE"}};
  for (const v1::CheckpointManifest& checkpoint : response.checkpoints()) {
    int64_t bytes = 0;
    for (const v1::FileRef& file : checkpoint.files()) bytes += file.size_bytes();
    if (context.format == Format::kName && checkpoint.damage().empty()) context.out() << "step:" << checkpoint.state().step() << "\n";
    rows.push_back({absl::StrCat(checkpoint.state().step()), Optional(checkpoint.has_eval_loss(), checkpoint.eval_loss()),
                    checkpoint.state().step() == best_step ? "best" : "-", FormatBytes(bytes), Time(checkpoint.create_time()),
                    checkpoint.damage().empty() ? "good" : "damaged"});
  }
  if (context.format != Format::kTable) return kOk;
  context.out() << FormatTable(rows);
  for (const v1::CheckpointManifest& checkpoint : response.checkpoints()) {
    if (!checkpoint.damage().empty()) context.out() << "step " << checkpoint.state().step() << " cannot be used: " << checkpoint.damage() << "\n";
  }
  return kOk;
}

}  // namespace ppft::ctl
