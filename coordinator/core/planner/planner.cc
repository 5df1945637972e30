#include "coordinator/core/planner/planner.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/base/format.h"
#include "common/base/status.h"
#include "common/pipeline/mesh.h"
#include "coordinator/core/planner/memory.h"
#include "coordinator/core/planner/remedies.h"

namespace ppft::coordinator {
namespace {

std::vector<PlanDevice> OfKind(const std::vector<PlanDevice>& devices, absl::string_view kind) {
  std::vector<PlanDevice> matching;
  std::copy_if(devices.begin(), devices.end(), std::back_inserter(matching), [&](const PlanDevice& device) { return device.kind == kind; });
  return matching;
}

// Those on which a rank of that size fits.
std::vector<PlanDevice> WithMemory(const std::vector<PlanDevice>& devices, int64_t bytes) {
  std::vector<PlanDevice> enough;
  std::copy_if(devices.begin(), devices.end(), std::back_inserter(enough),
               [&](const PlanDevice& device) { return device.memory_bytes == 0 || device.memory_bytes >= bytes; });
  return enough;
}

PlanFacts FactsOf(const PlanRequest& request) {
  PlanFacts facts{request.supervised_ratio, request.longest_row, request.documents};
  for (const PlanDevice& device : request.devices) {
    facts.flash = facts.flash || device.flash;
    facts.deterministic = facts.deterministic || device.deterministic;
  }
  return facts;
}

// What the job leaves to the planner, the least recomputation first; else what it asks for.
std::vector<model::ActivationCheckpointing> CheckpointingsOf(const v1::JobSpec& spec) {
  using model::ActivationCheckpointing;
  if (spec.parallel().activation_checkpointing() == "auto") {
    return {ActivationCheckpointing::kNone, ActivationCheckpointing::kSelective, ActivationCheckpointing::kFull};
  }
  return {model::ParseActivationCheckpointing(spec.parallel().activation_checkpointing()).value_or(ActivationCheckpointing::kNone)};
}

bool FindsRoom(const Layout& layout, const std::vector<PlanDevice>& devices) {
  return static_cast<int>(WithMemory(devices, layout.largest_rank_bytes()).size()) >= layout.num_ranks();
}

// With the most micro-batches per pass, up to `most`, with which `fits`; with one where none does.
absl::StatusOr<Layout> WidestLayout(int most, const std::function<absl::StatusOr<Layout>(int microbatches_per_pass)>& make,
                                    const std::function<bool(const Layout&)>& fits) {
  PPFT_ASSIGN_OR_RETURN(Layout widest, make(most));
  if (most == 1 || fits(widest)) return widest;
  PPFT_ASSIGN_OR_RETURN(widest, make(1));
  if (!fits(widest)) return widest;
  for (int high = most; high - widest.microbatches_per_pass > 1;) {
    const int middle = (widest.microbatches_per_pass + high) / 2;
    PPFT_ASSIGN_OR_RETURN(Layout layout, make(middle));
    if (fits(layout)) {
      widest = std::move(layout);
    } else {
      high = middle;
    }
  }
  return widest;
}

// The smallest allowed pipeline whose ranks find room, there with the least recomputation; the smallest of all, as sparing as it may be, when none does.
// With fewer devices than a pipeline needs, the largest device there is (of unknown size if there is none) decides about recomputation. Micro-batches are
// merged as far as the memory allows then.
absl::StatusOr<Layout> ChooseLayout(const PlanRequest& request, absl::string_view kind, const std::vector<PlanDevice>& devices) {
  const int replicas = std::max(1, request.spec.parallel().data_parallel_size());
  const int most = static_cast<int>(devices.size()) / replicas;
  const std::vector<int> sizes = PipelineSizes(request.spec, request.config, most);
  v1::JobSpec spec = request.spec;
  // One stage and two give the same bits on deterministic devices, and only one of them could merge.
  const bool merges = std::none_of(devices.begin(), devices.end(), [](const PlanDevice& device) { return device.deterministic; });
  const auto fits = [&](const Layout& layout) {
    if (static_cast<int>(devices.size()) >= layout.num_ranks()) return FindsRoom(layout, devices);
    return devices.empty() || !WithMemory(devices, layout.largest_rank_bytes()).empty();
  };
  std::optional<Layout> fallback;
  for (const int size : sizes) {
    for (const model::ActivationCheckpointing checkpointing : CheckpointingsOf(request.spec)) {
      spec.mutable_parallel()->set_activation_checkpointing(std::string(model::WordOf(checkpointing)));
      const auto make = [&](int microbatches_per_pass) { return MakeLayout(spec, request.config, size, kind, FactsOf(request), microbatches_per_pass); };
      PPFT_ASSIGN_OR_RETURN(Layout layout, WidestLayout(merges ? MostMicrobatchesPerPass(spec, request.config, size, kind) : 1, make, fits));
      if (fits(layout)) return layout;
      if (size == sizes.front()) fallback = std::move(layout);
    }
  }
  return *std::move(fallback);
}

absl::Status OutOfMemory(const PlanRequest& request, const Layout& layout, absl::string_view kind, const std::vector<PlanDevice>& devices) {
  // Enough devices have so much: what stays below it can start.
  std::vector<int64_t> memory;
  for (const PlanDevice& device : devices) memory.push_back(device.memory_bytes > 0 ? device.memory_bytes : std::numeric_limits<int64_t>::max());
  std::sort(memory.begin(), memory.end(), std::greater<>());
  const int64_t limit = memory[static_cast<size_t>(layout.num_ranks()) - 1];
  const int num_devices = static_cast<int>(WithMemory(devices, limit).size());
  const int worst = static_cast<int>(std::max_element(layout.peak_bytes.begin(), layout.peak_bytes.end()) - layout.peak_bytes.begin());
  v1::JobSpec spec = request.spec;
  spec.mutable_parallel()->set_activation_checkpointing(layout.checkpointing);
  const PlanFacts facts = FactsOf(request);
  const std::vector<std::string> settings = NearestRemedies({spec, request.config, facts, layout, kind, limit, num_devices});
  const v1::MemoryEstimate& parts = layout.memory[static_cast<size_t>(worst)];
  return absl::ResourceExhaustedError(absl::StrCat(
      "pipeline rank ", worst, " needs about ", FormatBytes(layout.largest_rank_bytes()), " (weights ", FormatBytes(parts.weight_bytes()), ", activations ",
      FormatBytes(parts.activation_bytes()), ", the rest ", FormatBytes(layout.largest_rank_bytes() - parts.weight_bytes() - parts.activation_bytes()),
      "), but ",
      layout.num_ranks() == 1 ? absl::StrCat("the largest ", kind, " device has ") : absl::StrCat(layout.num_ranks(), " ", kind, " devices have only "),
      FormatBytes(limit), ": ",
      settings.empty() ? "use devices with more memory or a smaller model" : absl::StrCat("it would fit with ", absl::StrJoin(settings, ", or "))));
}

std::string Explain(const Layout& layout, const std::vector<PlanDevice>& chosen, const v1::JobSpec& spec) {
  std::vector<int> layers;
  for (const v1::StagePlan& stage : layout.stages) layers.push_back(stage.num_layers());
  std::string text = layers.size() == 1 ? absl::StrCat("1 stage with ", layers[0] == 1 ? "the only layer" : absl::StrCat("all ", layers[0], " layers"))
                                        : absl::StrCat(layers.size(), " stages of ", absl::StrJoin(layers, ", "), " layers");
  if (layers.size() > 1) {
    absl::StrAppend(&text, spec.parallel().layers_per_stage_size() > 0 ? " as asked" : " balanced by cost",
                    absl::StrFormat(" (the head counts as %.1f layers; the costliest rank is %.2f x the mean)", layout.head_layers, layout.imbalance));
  }
  if (layout.data_parallel_size > 1) absl::StrAppend(&text, ", ", layout.data_parallel_size, " replicas");
  const bool slow = layout.compute != "fp32" && !chosen.empty() && chosen[0].kind == "cpu";
  if (layout.checkpointing != "none") {
    absl::StrAppend(&text, ", ", layout.checkpointing, " activation checkpointing",
                    spec.parallel().activation_checkpointing() == "auto" ? " (the least that fits)" : "");
  }
  absl::StrAppend(
      &text, ", ", ToString(layout.schedule), " over ", layout.num_microbatches, layout.num_microbatches == 1 ? " micro-batch of " : " micro-batches of ",
      layout.microbatch_tokens, " tokens", layout.microbatches_per_pass > 1 ? absl::StrCat(", ", layout.microbatches_per_pass, " in a pass,") : "", " in ",
      layout.compute, slow ? " (slow on CPUs: they have no fast products for it)" : "",
      absl::StrFormat(", predicted bubble %.1f %%", 100 * layout.simulation.bubble_ratio), "; a rank needs up to ", FormatBytes(layout.largest_rank_bytes()));
  if (!chosen.empty()) {
    std::set<std::string> workers;
    for (const PlanDevice& device : chosen) workers.insert(device.worker);
    absl::StrAppend(&text, workers.size() == 1 ? ", all on worker " : ", on workers ", absl::StrJoin(workers, ", "));
  }
  return text;
}

// `chosen` in rank order, or empty.
v1::Plan FillPlan(const PlanRequest& request, const Layout& layout, const std::vector<PlanDevice>& chosen) {
  v1::Plan plan;
  plan.set_data_parallel_size(layout.data_parallel_size);
  plan.set_pipeline_parallel_size(layout.pipeline_size);
  plan.set_virtual_stages(layout.virtual_stages);
  plan.set_schedule(ToString(layout.schedule));
  plan.set_num_microbatches(layout.num_microbatches);
  plan.set_zero_stage(request.spec.parallel().zero_stage());
  plan.set_compute(layout.compute);
  plan.set_total_steps(request.total_steps);
  plan.set_microbatch_tokens(layout.microbatch_tokens);
  plan.set_predicted_bubble_ratio(layout.simulation.bubble_ratio);
  plan.set_activation_checkpointing(layout.checkpointing);
  plan.set_microbatches_per_pass(layout.microbatches_per_pass);
  plan.set_explanation(Explain(layout, chosen, request.spec));
  for (const v1::StagePlan& stage : layout.stages) *plan.add_stages() = stage;
  const pipeline::Mesh mesh{layout.data_parallel_size, layout.pipeline_size, layout.virtual_stages};
  for (int rank = 0; rank < mesh.num_ranks(); ++rank) {
    const int pipeline_rank = mesh.PipelineRankOf(rank);
    v1::RankPlan& out = *plan.add_ranks();
    out.set_rank(rank);
    out.set_replica(mesh.ReplicaOf(rank));
    out.set_pipeline_rank(pipeline_rank);
    for (int stage : mesh.StagesOf(rank)) out.add_stages(stage);
    out.set_program(FormatProgram(layout.programs[pipeline_rank]));
    out.set_peak_activations(layout.simulation.peak_activations[pipeline_rank]);
    out.set_peak_bytes(layout.peak_bytes[pipeline_rank]);
    *out.mutable_memory() = layout.memory[pipeline_rank];
    if (chosen.empty()) continue;
    out.set_worker(chosen[rank].worker);
    out.set_device(chosen[rank].id);
    const int threads = std::max(1, chosen[rank].threads);
    plan.set_threads_per_rank(rank == 0 ? threads : std::min(plan.threads_per_rank(), threads));
  }
  return plan;
}

// What of the mesh is above one.
std::string FewerDevices(const Layout& layout) {
  if (layout.num_ranks() == 1) return "";
  return absl::StrCat("; lower ", layout.pipeline_size > 1 ? "parallel.pipeline_parallel_size" : "",
                      layout.pipeline_size > 1 && layout.data_parallel_size > 1 ? " or " : "",
                      layout.data_parallel_size > 1 ? "parallel.data_parallel_size" : "", " to need fewer");
}

absl::StatusOr<PlanDraft> DraftOnAll(const PlanRequest& request, absl::string_view kind) {
  const std::vector<PlanDevice> devices = OfKind(request.devices, kind);
  PPFT_ASSIGN_OR_RETURN(const Layout layout, ChooseLayout(request, kind, devices));
  PlanDraft draft;
  draft.devices_needed = layout.num_ranks();
  draft.devices_present = static_cast<int>(devices.size());
  std::vector<PlanDevice> chosen;
  if (draft.devices_present < draft.devices_needed) {
    draft.fit = absl::UnavailableError(absl::StrCat("the job needs ", draft.devices_needed, kind == "cuda" ? " cuda" : "",
                                                    draft.devices_needed == 1 ? " device" : " devices", " (data_parallel_size ", layout.data_parallel_size,
                                                    " x pipeline_parallel_size ", layout.pipeline_size, "), ", draft.devices_present, " ",
                                                    draft.devices_present == 1 ? "is" : "are", " there: it waits for more", FewerDevices(layout)));
  } else {
    chosen = ChooseDevices(WithMemory(devices, layout.largest_rank_bytes()), layout.data_parallel_size, layout.pipeline_size);
    if (chosen.empty()) draft.fit = OutOfMemory(request, layout, kind, devices);
  }
  draft.plan = FillPlan(request, layout, chosen);
  return draft;
}

// On devices of one kind; where those on which attention needs more memory stand in the way, on the others.
absl::StatusOr<PlanDraft> DraftOn(const PlanRequest& request, absl::string_view kind) {
  PPFT_ASSIGN_OR_RETURN(PlanDraft draft, DraftOnAll(request, kind));
  if (draft.fit.ok()) return draft;
  PlanRequest others = request;
  if (std::erase_if(others.devices, [](const PlanDevice& device) { return device.flash; }) == 0 || OfKind(others.devices, kind).empty()) return draft;
  PPFT_ASSIGN_OR_RETURN(PlanDraft on_others, DraftOnAll(others, kind));
  return on_others.fit.ok() ? on_others : draft;
}

absl::Status Broken(absl::string_view what) { return absl::FailedPreconditionError(absl::StrCat("the plan cannot be executed: ", what)); }

absl::Status CheckStages(const v1::Plan& plan, const pipeline::Mesh& mesh, int64_t num_layers) {
  if (plan.stages_size() != mesh.num_stages()) return Broken(absl::StrCat(plan.stages_size(), " stages are listed, the mesh has ", mesh.num_stages()));
  int64_t next_layer = 0;
  for (int s = 0; s < plan.stages_size(); ++s) {
    const v1::StagePlan& stage = plan.stages(s);
    if (stage.stage() != s || stage.first_layer() != next_layer || stage.num_layers() < 1)
      return Broken(absl::StrCat("stage ", s, " does not follow the one before it"));
    if (stage.has_embedding() != (s == 0) || stage.has_head() != (s + 1 == plan.stages_size()))
      return Broken(absl::StrCat("stage ", s, " has the wrong ends of the model"));
    next_layer += stage.num_layers();
  }
  if (next_layer != num_layers) return Broken(absl::StrCat("the stages hold ", next_layer, " of ", num_layers, " layers"));
  return absl::OkStatus();
}

absl::Status CheckRanks(const v1::Plan& plan, const pipeline::Mesh& mesh) {
  if (plan.ranks_size() != mesh.num_ranks()) return Broken(absl::StrCat(plan.ranks_size(), " ranks are listed, the mesh has ", mesh.num_ranks()));
  std::set<std::pair<std::string, std::string>> devices;
  for (int r = 0; r < plan.ranks_size(); ++r) {
    const v1::RankPlan& rank = plan.ranks(r);
    const std::vector<int> stages(rank.stages().begin(), rank.stages().end());
    if (rank.rank() != r || rank.replica() != mesh.ReplicaOf(r) || rank.pipeline_rank() != mesh.PipelineRankOf(r) || stages != mesh.StagesOf(r)) {
      return Broken(absl::StrCat("rank ", r, " is not at its place in the mesh"));
    }
    if (rank.worker().empty() || rank.device().empty()) return Broken(absl::StrCat("rank ", r, " has no device"));
    if (!devices.emplace(rank.worker(), rank.device()).second) return Broken(absl::StrCat("two ranks share ", rank.device(), " of worker ", rank.worker()));
  }
  return absl::OkStatus();
}

absl::Status DryRun(const v1::Plan& plan, const pipeline::Mesh& mesh, int replica) {
  const int per_pass = std::max(1, plan.microbatches_per_pass());
  std::vector<pipeline::Program> programs;
  for (int rank : mesh.PipelineOf(replica)) {
    absl::StatusOr<pipeline::Program> program = pipeline::ParseProgram(plan.ranks(rank).program());
    if (!program.ok()) return Broken(absl::StrCat("rank ", rank, ": ", program.status().message()));
    programs.push_back(*std::move(program));
  }
  absl::StatusOr<pipeline::Simulation> run =
      pipeline::Simulate(programs, {mesh.num_stages(), (plan.num_microbatches() + per_pass - 1) / per_pass}, pipeline::RendezvousOptions());
  if (!run.ok()) return Broken(absl::StrCat("replica ", replica, ": ", run.status().message()));
  for (int p = 0; p < mesh.pipeline_size; ++p) {
    const int stated = plan.ranks(mesh.RankOf(replica, p)).peak_activations();
    if (stated != run->peak_activations[p]) {
      return Broken(absl::StrCat("rank ", mesh.RankOf(replica, p), " would hold ", run->peak_activations[p], " activations, the plan states ", stated));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PlanDraft> DraftPlan(const PlanRequest& request) {
  if (!(request.supervised_ratio > 0 && request.supervised_ratio <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("supervised_ratio (", request.supervised_ratio, ") must be above 0 and at most 1"));
  }
  if (!request.kind.empty()) return DraftOn(request, request.kind);
  return DraftOn(request, OfKind(request.devices, "cuda").empty() ? "cpu" : "cuda");
}

absl::StatusOr<v1::Plan> PlanJob(const PlanRequest& request) {
  PPFT_ASSIGN_OR_RETURN(PlanDraft draft, DraftPlan(request));
  PPFT_RETURN_IF_ERROR(draft.fit);
  PPFT_RETURN_IF_ERROR(CheckPlan(draft.plan, request.config.num_layers));
  return std::move(draft.plan);
}

absl::Status CheckPlan(const v1::Plan& plan, int64_t num_layers) {
  const pipeline::Mesh mesh{plan.data_parallel_size(), plan.pipeline_parallel_size(), plan.virtual_stages()};
  if (mesh.data_parallel_size < 1 || mesh.pipeline_size < 1 || mesh.virtual_stages < 1) return Broken("a size of the mesh is below 1");
  if (plan.microbatches_per_pass() < 0 || plan.microbatches_per_pass() > plan.num_microbatches()) {
    return Broken(absl::StrCat(plan.microbatches_per_pass(), " of ", plan.num_microbatches(), " micro-batches are merged"));
  }
  PPFT_RETURN_IF_ERROR(CheckStages(plan, mesh, num_layers));
  PPFT_RETURN_IF_ERROR(CheckRanks(plan, mesh));
  for (int replica = 0; replica < mesh.data_parallel_size; ++replica) PPFT_RETURN_IF_ERROR(DryRun(plan, mesh, replica));
  return absl::OkStatus();
}

}  // namespace ppft::coordinator
