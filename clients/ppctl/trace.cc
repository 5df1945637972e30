// trace: the next steps of a job as a Chrome trace.

#include "absl/strings/str_cat.h"
#include "clients/ppctl/chrome_trace.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/format.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "common/net/channel.h"
#include "common/net/status.h"

namespace ppft::ctl {
namespace {

// A job may still wait for devices, and steps may be slow.
constexpr absl::Duration kTraceTime = absl::Hours(6);

}  // namespace

Result Trace(Context& context, const TraceOptions& options) {
  v1::GetJobRequest named;
  named.set_id(options.job);
  v1::Job job;
  PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::GetJob, named, &job));
  v1::TraceJobRequest request;
  request.set_id(job.id());
  request.set_num_steps(options.num_steps);
  context.err() << "tracing " << options.num_steps << (options.num_steps == 1 ? " step" : " steps") << " of " << job.id() << ", which is "
                << StateWord(job.status().state()) << (job.status().step() > 0 ? absl::StrCat(" at step ", job.status().step()) : "")
                << " (Ctrl-C gives up, the job goes on)" << std::endl;
  grpc::ClientContext call;
  net::SetDeadline(&call, context.timeout_given ? context.timeout : kTraceTime);
  std::vector<v1::TraceJobResponse> parts;
  {
    auto stream = context.jobs()->TraceJob(&call, request);
    v1::TraceJobResponse part;
    while (stream->Read(&part)) parts.push_back(part);
    const absl::Status status = net::StatusFromGrpc(stream->Finish());
    if (!status.ok()) return context.Explain(status);
  }
  int64_t first = 0, last = 0, spans = 0;
  for (const v1::TraceJobResponse& part : parts) {
    first = std::max(first, part.trace().first_step());
    last = std::max(last, part.trace().last_step());
    spans += part.trace().spans_size();
  }
  if (first == 0) return absl::FailedPreconditionError(absl::StrCat(job.id(), " did its last step before the trace could begin"));
  const std::string trace = ChromeTrace(job.id(), parts);
  if (options.file == "-") {
    context.out() << trace;
  } else {
    const absl::Status written = WriteFileAtomic(options.file, trace);
    if (!written.ok()) return absl::InternalError(written.message());
  }
  context.err() << TraceSummary(parts);
  if (options.file != "-") {
    context.err() << "steps " << first << " to " << last << ", " << spans << " spans: open " << options.file << " at https://ui.perfetto.dev\n";
  }
  return kOk;
}

}  // namespace ppft::ctl
