// submit, validate and plan: the commands that take a job.yaml.
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/follow.h"
#include "clients/ppctl/format.h"
#include "clients/ppctl/job_file.h"
#include "common/base/format.h"
#include "common/base/status.h"

namespace ppft::ctl {
namespace {

// Everything that can be said without storing anything.
absl::StatusOr<JobFile> Checked(Context& context, const JobFileOptions& options) {
  PPFT_ASSIGN_OR_RETURN(JobFile job, JobFile::Load(context, options.file, options.overrides));
  PPFT_RETURN_IF_ERROR(job.Check(context));
  return job;
}

std::string Layers(const v1::StagePlan& stage) {
  std::vector<std::string> parts;
  if (stage.has_embedding()) parts.push_back("embedding");
  if (stage.num_layers() == 1) parts.push_back(absl::StrCat("layer ", stage.first_layer()));
  if (stage.num_layers() > 1) parts.push_back(absl::StrCat("layers ", stage.first_layer(), "-", stage.first_layer() + stage.num_layers() - 1));
  if (stage.has_head()) parts.push_back("head");
  return absl::StrJoin(parts, " + ");
}

std::string Place(const v1::Plan& plan, int stage) {
  std::vector<std::string> places;
  for (const v1::RankPlan& rank : plan.ranks()) {
    for (const int held : rank.stages()) {
      if (held != stage) continue;
      places.push_back(rank.worker().empty() ? absl::StrCat("rank ", rank.rank()) : absl::StrCat(rank.worker(), " ", rank.device()));
    }
  }
  return places.empty() ? "-" : absl::StrJoin(places, ", ");
}

std::string StageTable(const v1::Plan& plan) {
  std::vector<std::vector<std::string>> rows = {{"STAGE", "HOLDS", "SHARE", "ON"}};
  double total = 0;
  for (const v1::StagePlan& stage : plan.stages()) total += stage.forward_cost() + stage.backward_cost();
  for (const v1::StagePlan& stage : plan.stages()) {
    const double cost = stage.forward_cost() + stage.backward_cost();
    rows.push_back({absl::StrCat(stage.stage()), Layers(stage), absl::StrCat(total > 0 ? static_cast<int>(100 * cost / total + 0.5) : 0, " %"),
                    Place(plan, stage.stage())});
  }
  return FormatTable(rows);
}

std::string MemoryTable(const v1::Plan& plan) {
  std::vector<std::vector<std::string>> rows = {
      {"RANK", "STAGES", "IN FLIGHT", "WEIGHTS", "ADAPTER", "ACTIVATIONS", "WORKSPACE", "TRANSFERS", "RUNTIME", "MEMORY"}};
  for (const v1::RankPlan& rank : plan.ranks()) {
    const v1::MemoryEstimate& memory = rank.memory();
    rows.push_back({absl::StrCat(rank.rank()), absl::StrJoin(rank.stages(), ","), absl::StrCat(rank.peak_activations()), FormatBytes(memory.weight_bytes()),
                    FormatBytes(memory.adapter_bytes()), FormatBytes(memory.activation_bytes()), FormatBytes(memory.workspace_bytes()),
                    FormatBytes(memory.transfer_bytes()), FormatBytes(memory.runtime_bytes()), FormatBytes(rank.peak_bytes())});
  }
  return FormatTable(rows);
}

// " in 1 pass": where micro-batches are merged.
std::string Passes(const v1::Plan& plan) {
  const int per_pass = plan.microbatches_per_pass();
  if (per_pass <= 1) return "";
  const int passes = (plan.num_microbatches() + per_pass - 1) / per_pass;
  return passes == 1 ? " in 1 pass" : absl::StrCat(" in ", passes, " passes of up to ", per_pass);
}

std::string Count(int64_t count, const std::string& one) { return absl::StrCat(count, " ", one, count == 1 ? "" : "s"); }

void PrintPlan(Context& context, const v1::PlanJobResponse& response) {
  const v1::Plan& plan = response.plan();
  context.out() << "schedule " << (plan.schedule().empty() ? "-" : plan.schedule()) << ", " << Count(plan.pipeline_parallel_size(), "pipeline stage") << " x "
                << Count(plan.data_parallel_size(), "replica") << ", " << plan.num_microbatches()
                << (plan.num_microbatches() == 1 ? " micro-batch of " : " micro-batches of ") << plan.microbatch_tokens() << " tokens" << Passes(plan) << ", "
                << absl::StrCat(static_cast<int>(plan.predicted_bubble_ratio() * 1000 + 0.5) / 10.0) << " % bubble predicted";
  if (plan.total_steps() > 0) context.out() << ", " << Count(plan.total_steps(), "step");
  context.out() << "\ncompute " << (plan.compute().empty() ? "-" : plan.compute()) << ", activation checkpointing "
                << (plan.activation_checkpointing().empty() ? "-" : plan.activation_checkpointing()) << ", ZeRO stage " << plan.zero_stage() << "\n\n";
  context.out() << StageTable(plan) << "\n" << MemoryTable(plan) << "\n";
  if (!plan.explanation().empty()) context.out() << plan.explanation() << "\n";
  context.out() << (response.fits() ? "fits" : "does not fit") << ": needs " << Count(response.devices_needed(), "device") << ", " << response.devices_present()
                << (response.devices_present() == 1 ? " is there" : " are there") << (response.reason().empty() ? "" : ". ") << response.reason() << "\n";
}

}  // namespace

Result Validate(Context& context, const JobFileOptions& options) {
  PPFT_ASSIGN_OR_RETURN(const JobFile job, Checked(context, options));
  if (context.format == Format::kJson || context.format == Format::kYaml) {
    context.PrintMessage(v1::ValidateJobResponse());
  } else {
    context.out() << options.file << ": valid\n";
  }
  return kOk;
}

Result Plan(Context& context, const JobFileOptions& options) {
  PPFT_ASSIGN_OR_RETURN(JobFile job, Checked(context, options));
  v1::PlanJobRequest request;
  *request.mutable_spec() = job.spec();
  request.set_supervised_ratio(job.supervised_ratio());
  v1::PlanJobResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::PlanJob, request, &response));
  PPFT_RETURN_IF_ERROR(job.Report(context, response.violations()));
  if (!context.PrintMessage(response)) PrintPlan(context, response);
  return kOk;
}

Result Submit(Context& context, const JobFileOptions& options) {
  PPFT_ASSIGN_OR_RETURN(JobFile job, Checked(context, options));
  if (options.dry_run) {
    if (!context.PrintMessage(job.spec())) context.out() << spec::ToYaml(job.spec());
    context.err() << options.file << ": valid; nothing was submitted (--dry-run)\n";
    return kOk;
  }
  PPFT_RETURN_IF_ERROR(job.Upload(context));
  PPFT_RETURN_IF_ERROR(job.ValidateOnServer(context));
  v1::SubmitJobRequest request;
  request.set_request_id(options.request_id.empty() ? NewRequestId() : options.request_id);
  *request.mutable_spec() = job.spec();
  v1::Job submitted;
  PPFT_RETURN_IF_ERROR(context.Call(context.jobs(), &v1::JobService::StubInterface::SubmitJob, request, &submitted));
  const bool whole = context.format == Format::kJson || context.format == Format::kYaml;
  if (!whole) context.out() << submitted.id() << std::endl;
  if (options.follow) return Follow(context, submitted.id());
  context.PrintMessage(submitted);
  if (context.format == Format::kTable) context.err() << "submitted; follow it with: ppctl watch " << submitted.id() << "\n";
  return kOk;
}

}  // namespace ppft::ctl
