// The commands of ppctl. Each prints its data on out and its messages on err, and returns the exit code or the error to report.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/ppctl/context.h"

namespace ppft::ctl {

using Result = absl::StatusOr<int>;

struct JobFileOptions {
  std::string file;  // "-" reads standard input
  std::vector<std::string> overrides;
  std::string request_id;  // submit
  bool follow = false;     // submit
  bool dry_run = false;    // submit
};
Result Submit(Context& context, const JobFileOptions& options);
Result Validate(Context& context, const JobFileOptions& options);
Result Plan(Context& context, const JobFileOptions& options);

struct ListOptions {
  std::vector<std::string> states;
  std::vector<std::string> labels;  // "key=value"
};
Result ListJobs(Context& context, const ListOptions& options);
Result GetJob(Context& context, const std::string& job);
Result WatchJob(Context& context, const std::string& job);
Result CancelJob(Context& context, const std::string& job);
Result Events(Context& context, const std::string& job, bool follow);
Result Logs(Context& context, const std::string& job, bool follow);
struct MetricsOptions {
  std::string job;
  bool plot = false;
};
Result Metrics(Context& context, const MetricsOptions& options);
Result Checkpoints(Context& context, const std::string& job);

struct ShowOptions {
  std::string target;  // job.yaml, a dataset id or a data file
  std::string base_model, type;
  int dataset = 0;
  int num_rows = 3;
  std::vector<std::string> overrides;
};
Result DataUpload(Context& context, const std::vector<std::string>& files);
Result DataList(Context& context);
Result DataShow(Context& context, const ShowOptions& options);

Result ModelsRegister(Context& context, const std::string& name, const std::string& path);
Result ModelsUpload(Context& context, const std::string& name, const std::string& folder);
Result ModelsList(Context& context);

struct FetchOptions {
  std::string job;
  std::string folder = "final_model";
  std::string checkpoint;  // "" | best | latest | step:N
  std::string type = "adapter";
  bool force = false;
};
Result Fetch(Context& context, const FetchOptions& options);

struct TraceOptions {
  std::string job;
  std::string file = "trace.json";  // "-" writes standard output
  int num_steps = 3;
};
Result Trace(Context& context, const TraceOptions& options);

struct DoctorOptions {
  bool contents = false;  // reads every byte of models and datasets
  std::string version;    // ppctl's own
};
Result Doctor(Context& context, const DoctorOptions& options);

// Contexts of the config file. No coordinator is asked.
Result ConfigList(Context& context);
Result ConfigSet(Context& context, const std::string& name, const std::vector<std::string>& assignments);
Result ConfigUse(Context& context, const std::string& name);
Result ConfigDelete(Context& context, const std::string& name);

Result WorkersList(Context& context);
Result Status(Context& context);

}  // namespace ppft::ctl
