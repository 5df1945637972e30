#include "worker/agent/rank_runner.h"

#include <signal.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/logging.h"
#include "common/base/proto_time.h"
#include "common/base/status.h"
#include "common/net/status.h"
#include "worker/agent/cuda_devices.h"
#include "worker/trainer/beat.h"

namespace ppft::agent {
namespace {

constexpr std::chrono::seconds kTermGrace(5);
constexpr std::chrono::milliseconds kProgressPoll(500);

std::string DirectoryOf(const RankEnvironment& environment, const v1::RankKey& key) {
  return JoinPath(environment.work_directory, absl::StrCat("ranks/", key.job_id(), "-", key.epoch(), "-", key.rank()));
}

std::string Label(const v1::RankKey& key) { return absl::StrCat(key.job_id(), " epoch ", key.epoch(), " rank ", key.rank()); }

absl::Duration StallTimeout(const v1::JobSpec& spec) {
  const absl::Duration timeout = ToDuration(spec.limits().stall_timeout());
  return timeout > absl::ZeroDuration() ? timeout : absl::Seconds(300);
}

// The reason of a start that lacks a file of the adapter that the job begins with.
constexpr char kAdapterLost[] = "ADAPTER_LOST";

// The coordinator has said so of a file of its own. A file that is missing on this host is another matter, whatever its status code.
bool IsLostContent(const absl::Status& status) {
  const std::string reason = net::GetErrorInfo(status).reason;
  return reason == "CONTENT_DAMAGED" || reason == "CONTENT_MISSING";
}

}  // namespace

RankRunner::RankRunner(const RankEnvironment& environment, v1::RankDirective directive)
    : environment_(environment), directive_(std::move(directive)), directory_(DirectoryOf(environment, directive_.rank())) {
  Update(directive_);
  run_thread_ = std::thread([this] { Run(); });
}

RankRunner::~RankRunner() {
  Stop();
  run_thread_.join();
  if (watch_thread_.joinable()) watch_thread_.join();
  const absl::Status removed = RemoveAll(directory_);
  if (!removed.ok()) LogWarning(Label(key()), ": ", removed.message());  // the next agent cleans up
}

void RankRunner::Update(const v1::RankDirective& directive) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (peers_.endpoints().empty()) *peers_.mutable_endpoints() = directive.peers();
  trace_ = directive.trace();
  TellTrainer();
}

void RankRunner::Stop() {
  if (stopping_.exchange(true)) return;
  process_.Kill(SIGTERM);
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.clear();
  changed_.notify_all();
  if (!watch_thread_.joinable()) {
    watch_thread_ = std::thread([this] {
      std::unique_lock<std::mutex> wait(mutex_);
      if (!changed_.wait_for(wait, kTermGrace, [this] { return reads_done_; })) process_.Kill(SIGKILL);
    });
  }
}

void RankRunner::Run() {
  std::thread forward([this] { Forward(); });
  v1::Start start;
  absl::Status status = MakeFolders();
  // The process loads its libraries and makes its device ready while the files come.
  if (status.ok() && !stopping_) status = process_.Start(Command());
  if (status.ok() && !stopping_) status = Prepare(&start);
  if (status.ok() && !stopping_) {
    const v1::RankPlan& place = start.plan().ranks(key().rank());
    place_ = {key().job_id(), absl::StrCat(place.pipeline_rank()), absl::StrCat(place.replica())};
    environment_.metrics->BeginAttempt(place_);
    v1::AgentMessage message;
    *message.mutable_start() = std::move(start);
    Tell(message);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      started_ = true;
      TellTrainer();
    }
    std::thread progress([this] { WatchProgress(); });
    ReadReports();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      started_ = false;
      changed_.notify_all();
    }
    progress.join();
  }
  if (!status.ok() && !stopping_) {
    Enqueue(StartFailure(status));
    process_.Kill(SIGKILL);
  }
  if (process_.alive()) {
    if (stopping_) process_.Kill(SIGTERM);
    v1::TrainerReport report;
    *report.mutable_exited() = process_.Wait();
    if (!stopping_ && status.ok()) {
      const v1::Exited& exited = report.exited();
      LogInfo(Label(key()), ": trainer ended, ", exited.signal() != 0 ? absl::StrCat("signal ", exited.signal()) : absl::StrCat("status ", exited.status()));
      Enqueue(std::move(report));
    }
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reads_done_ = true;
    changed_.notify_all();
  }
  forward.join();
  running_ = false;
  environment_.on_end();
}

absl::Status RankRunner::MakeFolders() {
  PPFT_RETURN_IF_ERROR(RemoveAll(directory_));
  PPFT_RETURN_IF_ERROR(MakeDirs(JoinPath(directory_, "inputs")));
  return MakeDirs(JoinPath(directory_, "output"));
}

std::string RankRunner::InputPath(const v1::FileRef& file) const { return JoinPath(JoinPath(directory_, "inputs"), file.sha256()); }

absl::Status RankRunner::FetchFiles(const std::vector<v1::FileRef>& files) {
  const auto begin = std::chrono::steady_clock::now();
  PPFT_ASSIGN_OR_RETURN(const FileCache::Totals totals, environment_.cache->FetchAll(files, JoinPath(directory_, "inputs"), [this] { return !stopping_; }));
  LogInfo(Label(key()), ": fetched ", totals.files, " files, ", totals.bytes, " bytes, ", totals.downloaded_bytes, " of them from the coordinator, in ",
          absl::FormatDuration(absl::Trunc(absl::FromChrono(std::chrono::steady_clock::now() - begin), absl::Milliseconds(1))));
  return absl::OkStatus();
}

absl::Status RankRunner::FetchCheckpoint(const v1::CheckpointManifest& manifest, google::protobuf::RepeatedPtrField<v1::LocalFile>* out) {
  absl::Status status = FetchFiles({manifest.files().begin(), manifest.files().end()});
  if (IsLostContent(status)) {
    corrupt_step_ = manifest.state().step();
    net::SetErrorInfo(&status, {"CHECKPOINT_CORRUPT", {}});
  }
  PPFT_RETURN_IF_ERROR(status);
  for (const v1::FileRef& file : manifest.files()) {
    v1::LocalFile* local = out->Add();
    local->set_path(InputPath(file));
    *local->mutable_content() = file;
  }
  return absl::OkStatus();
}

absl::Status RankRunner::FetchInputs(v1::Start* start) {
  std::vector<v1::FileRef> files;
  const auto add = [&](const v1::FileRef& file, v1::LocalFile* local) {
    files.push_back(file);
    local->set_path(InputPath(file));
    *local->mutable_content() = file;
  };
  for (const v1::TensorRef& tensor : directive_.tensors()) {
    v1::LocalTensor* local = start->add_tensors();
    files.push_back(tensor.content());
    local->set_path(InputPath(tensor.content()));
    *local->mutable_tensor() = tensor;
  }
  add(directive_.train_tokens(), start->mutable_train_tokens());
  if (directive_.has_eval_tokens()) add(directive_.eval_tokens(), start->mutable_eval_tokens());
  PPFT_RETURN_IF_ERROR(FetchFiles(files));
  if (directive_.init_adapter().empty()) return absl::OkStatus();
  files.clear();
  for (const v1::FileRef& file : directive_.init_adapter()) add(file, start->add_init_adapter());
  absl::Status status = FetchFiles(files);
  if (IsLostContent(status)) net::SetErrorInfo(&status, {kAdapterLost, {}});
  return status;
}

absl::Status RankRunner::Prepare(v1::Start* start) {
  start->set_job_id(key().job_id());
  start->set_epoch(key().epoch());
  start->set_rank(key().rank());
  *start->mutable_spec() = directive_.spec();
  *start->mutable_plan() = directive_.plan();
  if (key().rank() < 0 || key().rank() >= start->plan().ranks_size()) {
    return absl::InternalError(absl::StrCat("the plan has ", start->plan().ranks_size(), " ranks and this is rank ", key().rank()));
  }
  start->set_model_config(directive_.model_config());
  if (directive_.has_resume()) {
    *start->mutable_resume() = directive_.resume();
    PPFT_RETURN_IF_ERROR(FetchCheckpoint(directive_.resume(), start->mutable_resume_files()));
  }
  if (directive_.has_best()) {
    *start->mutable_best() = directive_.best();
    PPFT_RETURN_IF_ERROR(FetchCheckpoint(directive_.best(), start->mutable_best_files()));
  }
  PPFT_RETURN_IF_ERROR(FetchInputs(start));
  start->set_directory(JoinPath(directory_, "output"));
  start->set_listen_address(environment_.address);
  start->set_beat_path(JoinPath(directory_, "beat"));
  start->set_merge_dtype(directive_.merge_dtype());
  return WriteFileAtomic(start->beat_path(), std::string(trainer::kBeatBytes, '\0'));
}

TrainerCommand RankRunner::Command() const {
  TrainerCommand command;
  command.binary = environment_.trainer_binary;
  command.directory = directory_;
  command.arguments = {"--device", device()};
  const int threads = std::max(1, directive_.plan().threads_per_rank());
  // MKL_CBWR: one code path whatever the alignment, so that a resumed run gives the same bits.
  const char* cbwr = __builtin_cpu_supports("avx2") ? "MKL_CBWR=AVX2,STRICT" : "MKL_CBWR=COMPATIBLE";
  command.environment = {cbwr, absl::StrCat("OMP_NUM_THREADS=", threads), absl::StrCat("MKL_NUM_THREADS=", threads), "MKL_DYNAMIC=FALSE"};
  command.environment.insert(command.environment.end(), environment_.trainer_environment.begin(), environment_.trainer_environment.end());
  if (absl::StartsWith(device(), "cuda:")) {
    // The trainer sees its own device alone.
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    command.environment.push_back(VisibleDevice(device(), visible == nullptr ? "" : visible));
  }
  return command;
}

void RankRunner::Tell(const v1::AgentMessage& message) {
  const absl::Status sent = process_.Send(message);
  if (!sent.ok()) LogWarning(Label(key()), ": ", sent.message());  // the trainer is gone: its exit is reported by Run
}

void RankRunner::TellTrainer() {
  if (!started_) return;
  v1::AgentMessage message;
  if (trace_.id() != trace_sent_) {
    trace_sent_ = trace_.id();
    *message.mutable_trace() = trace_;
    Tell(message);
  }
  if (peers_sent_ || peers_.endpoints().empty()) return;
  peers_sent_ = true;
  *message.mutable_peers() = peers_;
  Tell(message);
}

void RankRunner::ReadReports() {
  while (true) {
    absl::StatusOr<v1::TrainerReport> report = process_.Receive();
    if (!report.ok()) {
      if (!absl::IsOutOfRange(report.status()) && !stopping_) {
        LogWarning(Label(key()), ": ", report.status().message());
        process_.Kill(SIGKILL);
      }
      return;
    }
    if (report->has_stats()) {
      RecordStats(report->stats());
    } else {
      Enqueue(*std::move(report));
    }
  }
}

void RankRunner::Enqueue(v1::TrainerReport report) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return;
  queue_.push_back(std::move(report));
  changed_.notify_all();
}

void RankRunner::Forward() {
  while (true) {
    v1::TrainerReport report;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || reads_done_ || !queue_.empty(); });
      if (stopping_ || queue_.empty()) return;
      report = std::move(queue_.front());
      queue_.pop_front();
    }
    const absl::Status status = UploadFiles(&report);
    if (absl::IsFailedPrecondition(status) || stopping_) continue;  // given up: the directive will say so
    if (!status.ok()) {
      report = FailureReport(absl::IsResourceExhausted(status) ? "DISK_FULL" : "COMM_ERROR", absl::IsResourceExhausted(status) ? "OPERATOR" : "INFRASTRUCTURE",
                             absl::StrCat("upload failed: ", status.message()), "see the coordinator's log");
      process_.Kill(SIGKILL);
    }
    environment_.reports->Push(key(), std::move(report));
  }
}

absl::Status RankRunner::UploadFiles(v1::TrainerReport* report) {
  std::vector<v1::LocalFile*> files;
  if (report->has_checkpoint()) {
    for (v1::LocalFile& file : *report->mutable_checkpoint()->mutable_files()) files.push_back(&file);
  } else if (report->has_exported()) {
    for (v1::LocalFile& file : *report->mutable_exported()->mutable_adapter_files()) files.push_back(&file);
    for (v1::LocalFile& file : *report->mutable_exported()->mutable_merged_files()) files.push_back(&file);
  }
  for (v1::LocalFile* file : files) {
    std::chrono::milliseconds pause(100);
    absl::Status status;
    bool told = false;
    while (!stopping_) {
      status = environment_.upload(key(), *file);
      if (absl::IsResourceExhausted(status) && !told) {
        v1::TrainerReport waits;
        waits.mutable_log()->set_source("agent");
        waits.mutable_log()->set_severity("WARNING");
        waits.mutable_log()->set_text(absl::StrCat("a file waits to be uploaded: ", status.message()));
        environment_.reports->Push(key(), std::move(waits));
        told = true;
      }
      if (status.ok() || !(absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) || absl::IsAborted(status) || absl::IsResourceExhausted(status)))
        break;
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait_for(lock, pause, [this] { return stopping_.load(); });
      pause = std::min(pause * 2, std::chrono::milliseconds(2000));
    }
    PPFT_RETURN_IF_ERROR(status);
    const absl::Status removed = RemoveAll(file->path());
    if (!removed.ok()) LogWarning(Label(key()), ": ", removed.message());  // goes with the rank's folder
    file->clear_path();
  }
  return absl::OkStatus();
}

void RankRunner::WatchProgress() {
  const std::unique_ptr<trainer::Beat, void (*)(trainer::Beat*)> beat(trainer::MapBeat(JoinPath(directory_, "beat")), trainer::UnmapBeat);
  if (beat == nullptr) {
    LogWarning(Label(key()), ": ", ErrnoStatus(errno, "beat page").message(), "; a hang of this trainer will not be seen");
    return;
  }
  const absl::Duration timeout = StallTimeout(directive_.spec());
  uint64_t last_count = 0;
  auto changed_at = std::chrono::steady_clock::now();
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (changed_.wait_for(lock, kProgressPoll, [this] { return !started_ || stopping_; })) return;
    }
    const auto now = std::chrono::steady_clock::now();
    const uint64_t count = beat->counter.load(std::memory_order_acquire);
    const auto section = static_cast<trainer::Section>(beat->section.load(std::memory_order_relaxed));
    // Peers that are still fetching their files are nobody's fault: the coordinator watches the start as a whole. Nor are those that write their export, each
    // of which is watched where it writes.
    const bool waits = section == trainer::Section::kConnecting || (section == trainer::Section::kAwaitExport && !process_.stopped());
    if (count != last_count || waits) changed_at = now;
    last_count = count;
    // A rank that waits for another has its own deadline; the agent steps in only if that fails too.
    const absl::Duration budget = trainer::WaitsForPeer(section) ? 2 * timeout : timeout;
    if (absl::FromChrono(now - changed_at) < budget) continue;
    const std::string where = absl::StrCat("section \"", trainer::SectionName(section), "\", step ", beat->step.load());
    if (process_.stopped()) {
      v1::TrainerReport report =
          FailureReport("COMM_ERROR", "INFRASTRUCTURE",
                        absl::StrCat("the trainer's process is stopped (SIGSTOP or a debugger) for ", absl::FormatDuration(budget), " in ", where),
                        "the job starts again from its newest checkpoint; find out who stops processes on that host");
      report.mutable_failure()->set_peer(key().rank());  // its neighbours say the same of it
      Enqueue(std::move(report));
    } else {
      Enqueue(FailureReport("STAGE_HUNG", "INFRASTRUCTURE", absl::StrCat("no progress for ", absl::FormatDuration(budget), " in ", where),
                            "the job starts again from its newest checkpoint; raise limits.stall_timeout if its steps are that slow"));
    }
    process_.Kill(SIGKILL);
    return;
  }
}

void RankRunner::RecordStats(const v1::StageStats& stats) {
  for (const auto& [kind, seconds] : stats.busy_seconds()) environment_.metrics->FollowStageBusy(place_, kind, seconds);
  environment_.metrics->FollowStageTransport(place_, "sent", static_cast<double>(stats.sent_bytes()));
  environment_.metrics->FollowStageTransport(place_, "received", static_cast<double>(stats.received_bytes()));
  environment_.metrics->SetStageMemory(place_, "resident_peak", static_cast<double>(stats.memory_bytes()));
  environment_.metrics->SetBubbleRatio(place_, stats.bubble_ratio());
}

v1::TrainerReport RankRunner::StartFailure(const absl::Status& status) const {
  const std::string cause = net::GetErrorInfo(status).reason, text(status.message());
  if (cause == "CHECKPOINT_CORRUPT") {
    v1::TrainerReport report =
        FailureReport(cause, "INFRASTRUCTURE", text, "the job goes on from an older checkpoint by itself; look after the coordinator's disk");
    report.mutable_failure()->set_step(corrupt_step_);
    return report;
  }
  if (cause == "STORE_UNREADABLE") return FailureReport(cause, "OPERATOR", text, "mount the disk of the coordinator's --data_dir, then submit the job again");
  if (cause == kAdapterLost) {
    return FailureReport("STORE_UNREADABLE", "OPERATOR", text,
                         "look after the coordinator's disk, then upload the adapter again: submit the job with its folder as model.init_adapter");
  }
  if (IsLostContent(status)) {
    return FailureReport("STORE_UNREADABLE", "OPERATOR", text,
                         "look after the coordinator's disk, then submit the job again: its training data is prepared anew");
  }
  if (cause == "MODEL_INVALID") {
    return FailureReport(cause, "USER", text, "put the file back as it was, or register the model again under another name: ppctl models register NAME FOLDER");
  }
  if (absl::IsResourceExhausted(status)) return FailureReport("DISK_FULL", "OPERATOR", text, "free space under the worker's --work_dir");
  return FailureReport("COMM_ERROR", "INFRASTRUCTURE", text, "see the worker's log");
}

v1::TrainerReport RankRunner::FailureReport(const std::string& code, const std::string& owner, const std::string& message, const std::string& remedy) const {
  v1::TrainerReport report;
  v1::Failure* failure = report.mutable_failure();
  failure->mutable_reason()->set_code(code);
  failure->mutable_reason()->set_owner(owner);
  failure->mutable_reason()->set_message(absl::StrCat("rank ", key().rank(), " on ", environment_.worker_name, ": ", message));
  failure->mutable_reason()->set_remedy(remedy);
  failure->set_peer(-1);
  return report;
}

}  // namespace ppft::agent
