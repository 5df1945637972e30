#include "worker/agent/agent.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/logging.h"
#include "common/base/status.h"
#include "common/net/channel.h"
#include "common/net/status.h"
#include "worker/agent/host_facts.h"

namespace ppft::agent {
namespace {

constexpr absl::Duration kTransferTimeout = absl::Minutes(30);
constexpr absl::Duration kLockPatience = absl::Seconds(2);
constexpr int64_t kChunkBytes = 1 << 20;

std::string RandomIncarnation() {
  std::random_device device;
  return absl::StrFormat("%08x%08x", device(), device());
}

// One connection is served by one core at each end.
int NumDownloads() { return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 2u, 8u)); }

}  // namespace

Agent::Agent(AgentOptions options, metrics::WorkerMetrics* metrics)
    : options_(std::move(options)),
      incarnation_(RandomIncarnation()),
      metrics_(metrics),
      channel_(net::MakeChannel(options_.coordinator, options_.channel)),
      stub_(v1::WorkerService::NewStub(channel_)),
      reports_([this] {
        if (link_ != nullptr) link_->Wake(false);
      }),
      cache_(JoinPath(options_.work_directory, "cache"), options_.cache_limit_bytes, NumDownloads(),
             [this](const std::string& sha256, int64_t offset, bool check, const FileCache::Sink& sink) { return Download(sha256, offset, check, sink); }) {
  for (int i = 0; i < NumDownloads(); ++i) {
    downloads_.push_back(v1::WorkerService::NewStub(net::MakeChannel(options_.coordinator, options_.channel)));
  }
  environment_.cache = &cache_;
  environment_.reports = &reports_;
  environment_.metrics = metrics_;
  environment_.trainer_binary = options_.trainer_binary;
  environment_.trainer_environment = options_.trainer_environment;
  environment_.address = options_.address;
  environment_.work_directory = options_.work_directory;
  environment_.worker_name = options_.name;
  environment_.upload = [this](const v1::RankKey& rank, const v1::LocalFile& file) { return Upload(rank, file); };
  environment_.on_end = [this] {
    std::lock_guard<std::mutex> lock(mutex_);
    dirty_ = true;
    changed_.notify_all();
  };
}

Agent::~Agent() = default;

absl::Status Agent::Run() {
  PPFT_RETURN_IF_ERROR(TakeWorkFolder());
  PPFT_RETURN_IF_ERROR(cache_.Open(BootId()));
  link_ = std::make_unique<Link>(channel_, options_.coordinator, &reports_, MakeCallbacks());
  link_->Start();
  Reap();
  StopRanks();
  link_->Wake(true);
  absl::Status refusal;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    refusal = refusal_;
  }
  if (refusal.ok()) link_->Flush(absl::Seconds(2));
  link_.reset();
  return refusal;
}

absl::Status Agent::TakeWorkFolder() {
  PPFT_RETURN_IF_ERROR(MakeDirs(options_.work_directory));
  const std::string lock_path = JoinPath(options_.work_directory, "lock");
  lock_ = Fd(open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock_) return ErrnoStatus(errno, lock_path);
  // One that was just killed may hold it for another moment.
  bool locked = flock(lock_.get(), LOCK_EX | LOCK_NB) == 0;
  for (absl::Time end = absl::Now() + kLockPatience; !locked && absl::Now() < end; locked = flock(lock_.get(), LOCK_EX | LOCK_NB) == 0)
    absl::SleepFor(absl::Milliseconds(20));
  if (!locked) {
    return absl::FailedPreconditionError(
        absl::StrCat("--work_dir ", options_.work_directory, " is in use by another ppft-worker: stop it or choose another folder"));
  }
  // What ranks of an earlier incarnation left: their trainers died with it.
  return RemoveAll(JoinPath(options_.work_directory, "ranks"));
}

LinkCallbacks Agent::MakeCallbacks() {
  LinkCallbacks callbacks;
  callbacks.hello = [this] {
    v1::WorkerHello hello;
    hello.set_name(options_.name);
    hello.set_incarnation(incarnation_);
    hello.set_version(options_.version);
    hello.set_address(options_.address);
    hello.set_metrics_address(options_.metrics_address);
    for (const v1::Device& device : options_.devices) *hello.add_devices() = device;
    *hello.mutable_host() = options_.host;
    for (const std::string& problem : options_.problems) hello.add_problems(problem);
    for (const v1::RankKey& key : Running()) *hello.add_running() = key;
    return hello;
  };
  callbacks.heartbeat = [this] {
    v1::Heartbeat heartbeat;
    for (const v1::RankKey& key : Running()) *heartbeat.add_running() = key;
    heartbeat.set_disk_free_bytes(DiskFreeBytes(options_.work_directory));
    return heartbeat;
  };
  callbacks.on_directive = [this](const v1::Directive& directive) { OnDirective(directive); };
  callbacks.on_connected = [this](bool connected) { metrics_->SetConnected(connected); };
  callbacks.on_name_taken = [this] { OnDirective(v1::Directive()); };
  callbacks.on_refused = [this](const absl::Status& status) {
    std::lock_guard<std::mutex> lock(mutex_);
    refusal_ = status;
    shutdown_ = true;
    changed_.notify_all();
  };
  return callbacks;
}

void Agent::StopRanks() {
  std::unique_lock<std::mutex> lock(mutex_);
  waiting_.clear();
  for (auto& [key, rank] : ranks_) {
    // The coordinator learns at once that the rank has ended; the trainer itself is told to stop below.
    v1::TrainerReport report;
    report.mutable_exited()->set_detail("the worker was stopped");
    report.mutable_exited()->set_signal(SIGTERM);
    if (rank->running()) reports_.Push(rank->key(), std::move(report));
    rank->Stop();
    leaving_.push_back(std::move(rank));
  }
  ranks_.clear();
  std::vector<std::unique_ptr<RankRunner>> leaving = std::move(leaving_);
  lock.unlock();
  leaving.clear();  // joins them
}

void Agent::Shutdown() {
  std::lock_guard<std::mutex> lock(mutex_);
  shutdown_ = true;
  changed_.notify_all();
}

void Agent::Reap() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!shutdown_) {
    changed_.wait(lock, [this] { return shutdown_ || dirty_; });
    dirty_ = false;
    std::vector<std::unique_ptr<RankRunner>> ended;
    for (auto it = leaving_.begin(); it != leaving_.end();) {
      if ((*it)->running()) {
        ++it;
      } else {
        ended.push_back(std::move(*it));
        it = leaving_.erase(it);
      }
    }
    for (const auto& rank : ended) {
      const bool last = std::none_of(ranks_.begin(), ranks_.end(), [&](const auto& entry) { return std::get<0>(entry.first) == rank->key().job_id(); });
      if (last) metrics_->DropJob(rank->key().job_id());
    }
    // Joining is quick now, but it removes folders: outside the lock.
    lock.unlock();
    ended.clear();
    lock.lock();
    for (auto it = waiting_.begin(); it != waiting_.end();) {
      const v1::RankDirective directive = it->second;
      it = waiting_.erase(it);
      StartOrUpdate(directive);
      if (waiting_.count({directive.rank().job_id(), directive.rank().epoch(), directive.rank().rank()}) > 0) break;
    }
    metrics_->SetRanks(static_cast<double>(std::count_if(ranks_.begin(), ranks_.end(), [](const auto& entry) { return entry.second->running(); })));
    metrics_->SetCacheBytes(static_cast<double>(cache_.bytes()));
    link_->Wake(true);
  }
}

void Agent::OnDirective(const v1::Directive& directive) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::set<Key> wanted;
  for (const v1::RankDirective& rank : directive.ranks()) wanted.insert({rank.rank().job_id(), rank.rank().epoch(), rank.rank().rank()});
  for (auto it = ranks_.begin(); it != ranks_.end();) {
    if (wanted.count(it->first) > 0) {
      ++it;
      continue;
    }
    it->second->Stop();
    leaving_.push_back(std::move(it->second));
    it = ranks_.erase(it);
  }
  waiting_.clear();
  for (const v1::RankDirective& rank : directive.ranks()) StartOrUpdate(rank);
  dirty_ = true;
  changed_.notify_all();
}

void Agent::StartOrUpdate(const v1::RankDirective& directive) {
  const Key key = {directive.rank().job_id(), directive.rank().epoch(), directive.rank().rank()};
  const auto found = ranks_.find(key);
  if (found != ranks_.end()) {
    found->second->Update(directive);
    return;
  }
  // A device serves one trainer at a time: the one before must be gone.
  const bool busy = std::any_of(leaving_.begin(), leaving_.end(), [&](const auto& rank) { return rank->running() && rank->device() == directive.device(); });
  if (busy) {
    waiting_[key] = directive;
    return;
  }
  LogInfo(std::get<0>(key), " epoch ", std::get<1>(key), " rank ", std::get<2>(key), ": starting on ", directive.device());
  ranks_[key] = std::make_unique<RankRunner>(environment_, directive);
}

std::vector<v1::RankKey> Agent::Running() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<v1::RankKey> keys;
  for (const auto& [key, rank] : ranks_) {
    if (rank->running()) keys.push_back(rank->key());
  }
  for (const auto& rank : leaving_) {
    if (rank->running()) keys.push_back(rank->key());
  }
  for (const auto& [key, directive] : waiting_) keys.push_back(directive.rank());
  return keys;
}

absl::Status Agent::Download(const std::string& sha256, int64_t offset, bool check, const FileCache::Sink& sink) {
  grpc::ClientContext context;
  net::SetDeadline(&context, kTransferTimeout);
  v1::FetchFileRequest request;
  request.set_sha256(sha256);
  request.set_offset(offset);
  request.set_check(check);
  const auto stream = downloads_[next_download_++ % downloads_.size()]->FetchFile(&context, request);
  v1::FileChunk chunk;
  while (stream->Read(&chunk)) {
    absl::Status taken = absl::DataLossError(absl::StrCat("a chunk at offset ", chunk.offset(), " where ", offset, " was expected"));
    if (chunk.offset() == offset) taken = sink(chunk.data());
    if (!taken.ok()) {
      context.TryCancel();
      return taken;
    }
    offset += static_cast<int64_t>(chunk.data().size());
  }
  return net::StatusFromGrpc(stream->Finish());
}

absl::Status Agent::Upload(const v1::RankKey& rank, const v1::LocalFile& file) {
  grpc::ClientContext context;
  net::SetDeadline(&context, kTransferTimeout);
  v1::PutFileResponse response;
  const auto stream = stub_->PutFile(&context, &response);
  v1::PutFileRequest request;
  *request.mutable_header()->mutable_rank() = rank;
  *request.mutable_header()->mutable_file() = file.content();
  Fd fd(open(file.path().c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoStatus(errno, file.path());
  bool open = stream->Write(request);
  std::string buffer(kChunkBytes, '\0');
  while (open) {
    const ssize_t got = read(fd.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      context.TryCancel();
      return ErrnoStatus(errno, file.path());
    }
    if (got == 0) break;
    request.set_data(buffer.data(), static_cast<size_t>(got));
    open = stream->Write(request);
  }
  stream->WritesDone();
  return net::StatusFromGrpc(stream->Finish());
}

}  // namespace ppft::agent
