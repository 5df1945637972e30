// Workers: who is there, what they are told, and when they count as lost.
#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/format.h"
#include "common/base/logging.h"
#include "common/net/status.h"
#include "coordinator/core/checkpoints.h"
#include "coordinator/core/directive.h"
#include "coordinator/core/job_state.h"
#include "coordinator/job_controller.h"

namespace ppft::coordinator {
namespace {

google::protobuf::Duration ToProto(absl::Duration duration) {
  google::protobuf::Duration proto;
  const int64_t nanos = absl::ToInt64Nanoseconds(duration);
  proto.set_seconds(nanos / 1000000000);
  proto.set_nanos(static_cast<int32_t>(nanos % 1000000000));
  return proto;
}

absl::Status CheckHello(const v1::WorkerHello& hello) {
  if (hello.name().empty() || hello.name().size() > 63) return absl::InvalidArgumentError("hello.name must have 1 to 63 characters");
  if (hello.incarnation().empty()) return absl::InvalidArgumentError("hello.incarnation is empty");
  std::set<std::string> ids;
  for (const v1::Device& device : hello.devices()) {
    if (device.id().empty() || !ids.insert(device.id()).second) {
      return absl::InvalidArgumentError(absl::StrCat("hello.devices: \"", device.id(), "\" is empty or there twice"));
    }
  }
  return absl::OkStatus();
}

// Processes of two versions may not mean the same by one message.
absl::Status CheckVersion(const v1::WorkerHello& hello, const std::string& version) {
  if (version.empty() || hello.version() == version) return absl::OkStatus();
  const std::string theirs = hello.version().empty() ? "of an unknown version" : absl::StrCat("version ", hello.version());
  absl::Status status = absl::FailedPreconditionError(absl::StrCat("the ppft-worker \"", hello.name(), "\" at ", hello.address(), " is ", theirs,
                                                                   " and the coordinator is version ", version, ": both must be of one version; install ppft ",
                                                                   version, " on the worker's host and start the worker again"));
  net::SetErrorInfo(&status, {"VERSION_MISMATCH", {{"worker", hello.version()}, {"coordinator", version}}});
  LogWarning("refused: ", status.message());
  return status;
}

int32_t NumGpus(const v1::Worker& worker) {
  return static_cast<int32_t>(
      std::count_if(worker.devices().begin(), worker.devices().end(), [](const v1::Device& device) { return device.kind() == "cuda"; }));
}

absl::Status NameInUse(const v1::Worker& incumbent, absl::Duration lease) {
  const std::string& host = incumbent.host().hostname();
  absl::Status status = absl::AlreadyExistsError(
      absl::StrCat("the name \"", incumbent.name(), "\" is in use by a ppft-worker at ", incumbent.address(), host.empty() ? "" : absl::StrCat(" on ", host),
                   ": start this one with another --name; if that one is dead, its name is free when it has been silent for ", absl::FormatDuration(lease)));
  net::SetErrorInfo(&status, {"WORKER_NAME_IN_USE", {{"worker", incumbent.name()}}});
  return status;
}

}  // namespace

JobController::WorkerEntry& JobController::EntryOf(const std::string& name) {
  const auto [it, added] = workers_.try_emplace(name);
  if (added) {
    it->second.shown.set_name(name);
    it->second.last_seen = options_.steady();
  }
  return it->second;
}

JobController::WorkerEntry* JobController::ByLink(const std::shared_ptr<WorkerLink>& link) {
  for (auto& [name, worker] : workers_) {
    if (worker.link == link) return &worker;
  }
  return nullptr;
}

absl::Status JobController::OnHello(const std::shared_ptr<WorkerLink>& link, const v1::WorkerHello& hello) {
  if (absl::Status status = CheckHello(hello); !status.ok()) return status;
  if (absl::Status status = CheckVersion(hello, options_.version); !status.ok()) return status;
  WorkerEntry& worker = EntryOf(hello.name());
  const bool known = worker.shown.incarnation() == hello.incarnation();
  if (worker.link != nullptr && worker.link != link) {
    if (!known && options_.steady() - worker.last_seen <= options_.lease) return NameInUse(worker.shown, options_.lease);
    absl::Status replaced = absl::AbortedError(absl::StrCat("worker ", hello.name(), " connected again"));
    // A silent agent that wakes up has to let its ranks go: others run in their place.
    if (!known) net::SetErrorInfo(&replaced, {"WORKER_REPLACED", {{"worker", hello.name()}}});
    after_commit_.push_back([old = worker.link, replaced] { old->Close(replaced); });
  }
  if (!known) {
    // Its trainers died with the old agent.
    if (!worker.shown.incarnation().empty()) LoseRanks(worker, "was restarted");
    worker.acked_seq = 0;
    worker.row_changed = true;
    worker.applied_revision = 0;
  }
  worker.shown.set_incarnation(hello.incarnation());
  worker.shown.set_version(hello.version());
  worker.shown.set_address(hello.address());
  worker.shown.set_metrics_address(hello.metrics_address());
  *worker.shown.mutable_devices() = hello.devices();
  *worker.shown.mutable_host() = hello.host();
  *worker.shown.mutable_problems() = hello.problems();
  worker.shown.mutable_connect_time()->set_seconds(now_unix_ms() / 1000);
  worker.link = link;
  worker.lost = false;
  worker.last_seen = options_.steady();
  worker.directive_due = true;
  worker.running.clear();
  for (const v1::RankKey& key : hello.running()) worker.running.insert({key.job_id(), key.epoch(), key.rank()});
  NoteGpus(worker);
  queue_changed_ = true;
  LogInfo("worker ", hello.name(), known ? " is back" : " connected", " with ", Counted(hello.devices_size(), "device"), " at ", hello.address());
  v1::CoordinatorMessage message;
  *message.mutable_welcome()->mutable_heartbeat_interval() = ToProto(options_.heartbeat_interval);
  *message.mutable_welcome()->mutable_lease() = ToProto(options_.lease);
  message.mutable_welcome()->set_acked_seq(worker.acked_seq);
  after_commit_.push_back([link, message = std::move(message)] { link->Send(message); });
  return absl::OkStatus();
}

absl::Status JobController::OnWorkerMessage(const std::shared_ptr<WorkerLink>& link, const v1::WorkerMessage& message) {
  WorkerEntry* worker = ByLink(link);
  if (worker == nullptr) return absl::FailedPreconditionError("the stream was replaced");
  worker->last_seen = options_.steady();
  if (worker->lost) {
    worker->lost = false;  // the same agent after a long silence
    worker->directive_due = true;
    queue_changed_ = true;
  }
  if (message.has_heartbeat()) {
    std::set<Key> running;
    for (const v1::RankKey& key : message.heartbeat().running()) running.insert({key.job_id(), key.epoch(), key.rank()});
    if (running != worker->running) queue_changed_ = true;
    worker->running = std::move(running);
    worker->applied_revision = message.heartbeat().applied_revision();
    if (message.heartbeat().has_clock()) *worker->shown.mutable_clock() = message.heartbeat().clock();
    worker->shown.set_disk_free_bytes(message.heartbeat().disk_free_bytes());
  }
  if (message.has_report()) OnReport(*worker, message.report());
  return absl::OkStatus();
}

void JobController::OnWorkerClosed(const std::shared_ptr<WorkerLink>& link) {
  WorkerEntry* worker = ByLink(link);
  if (worker == nullptr) return;
  LogInfo("worker ", worker->shown.name(), ": the connection ended");
  worker->link = nullptr;
  worker->last_seen = options_.steady();
  queue_changed_ = true;
}

void JobController::TickWorkers() {
  int ready = 0, lost = 0;
  const absl::Time now = options_.steady();
  for (auto& [name, worker] : workers_) {
    const absl::Duration age = now - worker.last_seen;
    if (!worker.lost && age > options_.lease) {
      worker.lost = true;
      queue_changed_ = true;
      LoseRanks(worker, absl::StrCat("did not answer for ", absl::ToInt64Seconds(age), " s"));
      LogWarning("worker ", name, " is lost: silent for ", absl::FormatDuration(absl::Trunc(age, absl::Seconds(1))));
    }
    NoteGpus(worker);
    (worker.lost || worker.link == nullptr ? lost : ready) += 1;
    if (worker.link != nullptr) metrics_->SetWorkerHeartbeatAge(name, age);
  }
  metrics_->SetWorkers("ready", ready);
  metrics_->SetWorkers("lost", lost);
}

void JobController::NoteGpus(WorkerEntry& worker) {
  const int32_t offered = NumGpus(worker.shown);
  int32_t num = worker.num_gpus;
  int64_t away_ms = worker.gpus_away_unix_ms;
  const bool silent = worker.link == nullptr && worker.shown.devices().empty();  // not heard of since the coordinator's start
  if (offered > 0 && !worker.lost) {
    num = offered;
    away_ms = 0;
  } else if (!worker.lost && !silent && (!worker.shown.devices().empty() || worker.shown.problems().empty())) {
    num = 0;  // it is a worker without GPUs now
    away_ms = 0;
  } else if (num > 0 && away_ms == 0 && (worker.lost || !silent)) {
    away_ms = now_unix_ms();
  }
  if (num > 0 && away_ms > 0 && now_unix_ms() - away_ms >= absl::ToInt64Milliseconds(options_.gpu_wait)) {
    LogInfo("worker ", worker.shown.name(), ": its GPUs are not waited for any more");
    num = 0;
    away_ms = 0;
  }
  if (num == worker.num_gpus && away_ms == worker.gpus_away_unix_ms) return;
  worker.num_gpus = num;
  worker.gpus_away_unix_ms = away_ms;
  worker.row_changed = true;
  queue_changed_ = true;
}

std::vector<AwayGpus> JobController::GpusAway() const {
  std::vector<AwayGpus> away;
  for (const auto& [name, worker] : workers_) {
    if (worker.num_gpus == 0 || (!worker.lost && NumGpus(worker.shown) > 0)) continue;
    const int64_t since = worker.gpus_away_unix_ms;
    away.push_back({name, worker.num_gpus, since, since == 0 ? 0 : since + absl::ToInt64Milliseconds(options_.gpu_wait)});
  }
  return away;
}

void JobController::LoseRanks(const WorkerEntry& worker, const std::string& why) {
  for (auto& [id, job] : jobs_) {
    if (!HasRanks(job.record.job().status().state())) continue;
    for (const v1::RankPlan& rank : job.record.plan().ranks()) {
      if (rank.worker() != worker.shown.name()) continue;
      Failure failure{MakeReason("WORKER_LOST", absl::StrCat("worker ", rank.worker(), " ", why)), job.record.job().status().step()};
      failure.rank = rank.rank();
      failure.worker = rank.worker();
      OnFailure(job, failure);
      break;
    }
  }
}

std::set<std::string> JobController::Unreachable(const v1::Plan& plan) const {
  std::set<std::string> names;
  for (const v1::RankPlan& rank : plan.ranks()) {
    const auto worker = workers_.find(rank.worker());
    if (worker == workers_.end() || worker->second.link == nullptr) names.insert(rank.worker());
  }
  return names;
}

void JobController::DirectivesChanged(const JobEntry& job) {
  for (const v1::RankPlan& rank : job.record.plan().ranks()) EntryOf(rank.worker()).directive_due = true;
}

v1::Directive JobController::DirectiveFor(const std::string& name) {
  v1::Directive directive;
  for (auto& [id, job] : jobs_) {
    if (!HasRanks(job.record.job().status().state())) continue;
    AttemptInputs inputs;
    for (const v1::RankPlan& rank : job.record.plan().ranks()) {
      if (rank.worker() != name) continue;
      if (inputs.record == nullptr) {
        const auto model = Model(job.record.job().spec().model().base_model());
        if (!model.ok()) {
          LogError(id, ": ", model.status().ToString());
          break;
        }
        inputs.record = &job.record;
        inputs.model = *model;
        inputs.init_adapter = job.init_adapter;
        inputs.endpoints = &job.endpoints;
        inputs.trace = job.trace.has_value() ? &job.trace->order : nullptr;
        inputs.best = BestCheckpoint(job.checkpoints);
        for (const v1::CheckpointManifest& manifest : job.checkpoints) {
          if (manifest.state().step() == job.record.resume_step()) inputs.resume = &manifest;
        }
      }
      *directive.add_ranks() = DirectiveOf(inputs, rank);
    }
  }
  return directive;
}

void JobController::SendDirectives() {
  for (auto& [name, worker] : workers_) {
    if (!worker.directive_due || worker.link == nullptr) continue;
    worker.directive_due = false;
    v1::CoordinatorMessage message;
    *message.mutable_directive() = DirectiveFor(name);
    message.mutable_directive()->set_revision(next_revision_);
    for (Remnant& remnant : remnants_) {
      if (remnant.worker == name && remnant.revision == 0) remnant.revision = next_revision_;
    }
    ++next_revision_;
    worker.link->Send(std::move(message));
  }
}

bool JobController::IsGone(const Remnant& remnant) const {
  const auto it = workers_.find(remnant.worker);
  if (it == workers_.end()) return true;
  const WorkerEntry& worker = it->second;
  if (worker.shown.incarnation() != remnant.incarnation || worker.lost) return true;
  return worker.link != nullptr && remnant.revision > 0 && worker.applied_revision >= remnant.revision && worker.running.count(remnant.key) == 0;
}

void JobController::SweepRemnants() {
  const size_t before = remnants_.size();
  remnants_.erase(std::remove_if(remnants_.begin(), remnants_.end(), [this](const Remnant& remnant) { return IsGone(remnant); }), remnants_.end());
  if (remnants_.size() != before) queue_changed_ = true;
  for (auto& [id, job] : jobs_) FinishGivingUp(job);
}

bool JobController::IsWanted(const Key& key) const {
  const auto it = jobs_.find(std::get<0>(key));
  if (it == jobs_.end()) return false;
  const v1::JobStatus& status = it->second.record.job().status();
  return HasRanks(status.state()) && status.attempt_epoch() == std::get<1>(key);
}

std::vector<OfferedDevice> JobController::AllDevices() const {
  std::vector<OfferedDevice> devices;
  for (const auto& [name, worker] : workers_) {
    if (worker.lost) continue;
    for (const v1::Device& device : worker.shown.devices()) devices.push_back(OfferedDevice{name, device});
  }
  return devices;
}

std::vector<OfferedDevice> JobController::FreeDevices() const {
  std::set<std::pair<std::string, std::string>> busy;
  for (const auto& [id, job] : jobs_) {
    if (!HasRanks(job.record.job().status().state())) continue;
    for (const v1::RankPlan& rank : job.record.plan().ranks()) busy.insert({rank.worker(), rank.device()});
  }
  for (const Remnant& remnant : remnants_) busy.insert({remnant.worker, remnant.device});
  std::vector<OfferedDevice> devices;
  for (const auto& [name, worker] : workers_) {
    if (worker.lost || worker.link == nullptr) continue;
    // A rank that lives but is not wanted holds a device; its job's newest plan may not say which.
    bool strangers = false;
    for (const Key& key : worker.running) {
      const bool known = std::any_of(remnants_.begin(), remnants_.end(), [&](const Remnant& remnant) { return remnant.key == key; });
      strangers = strangers || (!known && !IsWanted(key));
    }
    if (strangers) continue;
    for (const v1::Device& device : worker.shown.devices()) {
      if (busy.count({name, device.id()}) == 0) devices.push_back(OfferedDevice{name, device});
    }
  }
  return devices;
}

void JobController::DeviceCounts(int* all, int* free) const {
  int present = 0;
  for (const auto& [name, worker] : workers_) {
    if (!worker.lost && worker.link != nullptr) present += worker.shown.devices_size();
  }
  *all = present;
  *free = static_cast<int>(FreeDevices().size());
}

std::vector<v1::Worker> JobController::Workers() const {
  std::vector<v1::Worker> shown;
  for (const auto& [name, worker] : workers_) {
    v1::Worker row = worker.shown;
    row.set_state(worker.lost || worker.link == nullptr ? "lost" : row.devices().empty() && !row.problems().empty() ? "unusable" : "ready");
    *row.mutable_heartbeat_age() = ToProto(options_.steady() - worker.last_seen);
    for (const auto& [id, job] : jobs_) {
      if (!HasRanks(job.record.job().status().state())) continue;
      for (const v1::RankPlan& rank : job.record.plan().ranks()) {
        if (rank.worker() != name) continue;
        v1::Lease& lease = *row.add_leases();
        lease.set_device(rank.device());
        lease.set_job_id(id);
        lease.set_rank(rank.rank());
        lease.set_epoch(job.record.job().status().attempt_epoch());
      }
    }
    shown.push_back(std::move(row));
  }
  return shown;
}

}  // namespace ppft::coordinator
