#include "worker/trainer/comm/device/device_transport.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::trainer {
namespace {

constexpr std::chrono::milliseconds kWatchInterval(100);
constexpr int64_t kIdPass = -1;  // of the messages that carry ids; programs count from 1

// Links are made in this order on every rank, so that no two ranks wait for each other.
auto OrderOf(const DeviceLink& link) { return std::make_tuple(link.channel, std::min(link.from, link.to), std::max(link.from, link.to), link.from); }

class DeviceTransportImpl final : public DeviceTransport {
 public:
  DeviceTransportImpl(std::unique_ptr<Transport> host, DeviceComms* comms, size_t sends_held)
      : host_(std::move(host)), comms_(comms), sends_held_(std::max<size_t>(1, sends_held)) {}
  ~DeviceTransportImpl() override { StopWatching(); }

  absl::Status MakeComms(const DeviceTransportOptions& options);

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  absl::StatusOr<Ticket> PostReceive(int peer, Channel channel, const Tag& tag, Buffer buffer) override;
  absl::Status Send(int peer, Channel channel, const Tag& tag, Buffer buffer) override;
  absl::Status Wait(Ticket ticket) override;
  void WaitWithoutLimit() override { host_->WaitWithoutLimit(); }
  absl::Status Close() override;
  void Abort(const absl::Status& cause) override { Fail(cause); }
  absl::Status status() const override;
  TransferCounts counts() const override;
  DeviceComm* group() override { return group_.get(); }
  int group_index() const override { return group_index_; }

 private:
  struct UnderWay {
    uint64_t operation = 0;
    std::shared_ptr<void> owner;
  };
  struct Posted {
    Ticket ticket = 0;
    Buffer buffer;
  };
  struct Lane {
    DeviceLink link;
    std::unique_ptr<DeviceComm> comm;
    std::deque<UnderWay> under_way;  // whose memory is still needed
    std::deque<Posted> posted;       // receives that are not queued yet
  };

  // Tickets of the host transport are even, ours are odd.
  static Ticket HostTicket(Ticket ticket) { return ticket * 2; }
  static bool IsHost(Ticket ticket) { return ticket % 2 == 0; }

  absl::StatusOr<std::unique_ptr<DeviceComm>> MakeComm(const std::vector<int>& members, int number, absl::Duration timeout, const std::string& what);
  absl::StatusOr<Lane*> Find(Channel channel, int from, int to);
  // The oldest `count` posted receives.
  void QueuePosted(Lane* lane, size_t count);
  static void Forget(Lane* lane);
  // The current stream goes on after that operation, and so does whatever gets its memory next.
  static void Pass(Lane* lane, uint64_t operation);
  // Runs what may throw. The first cause, where there is one, instead of its consequence.
  template <typename Body>
  absl::Status Guarded(int peer, Body&& body);
  absl::Status FirstCause() const;
  // What the communicators say of themselves.
  absl::Status AskComms() const;
  void Fail(const absl::Status& cause);
  void Watch();
  void StopWatching();

  const std::unique_ptr<Transport> host_;
  DeviceComms* const comms_;
  const size_t sends_held_;
  std::vector<Lane> lanes_;  // constant once made
  std::unique_ptr<DeviceComm> group_;
  int group_index_ = 0;
  int group_peer_ = -1;                                  // the other one of two; of more NCCL does not say which one an error is of
  std::map<Ticket, std::pair<Lane*, uint64_t>> queued_;  // posted receives: their lane and operation
  Ticket next_ticket_ = 1;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  absl::Status status_;    // guarded by mutex_: the first cause
  bool stopping_ = false;  // guarded by mutex_
  TransferCounts counts_;  // guarded by mutex_
  std::thread watcher_;
};

absl::StatusOr<std::unique_ptr<DeviceComm>> DeviceTransportImpl::MakeComm(const std::vector<int>& members, int number, absl::Duration timeout,
                                                                          const std::string& what) {
  const auto me = static_cast<int>(std::find(members.begin(), members.end(), rank()) - members.begin());
  auto id = std::make_shared<DeviceCommId>();
  const Tag tag{kIdPass, number, 0};
  Buffer buffer;
  buffer.data = id->data();
  buffer.bytes = static_cast<int64_t>(id->size());
  buffer.owner = id;
  if (me == 0) {
    PPFT_RETURN_IF_ERROR(Guarded(-1, [&] { *id = comms_->NewId(); }));
    for (size_t i = 1; i < members.size(); ++i) PPFT_RETURN_IF_ERROR(host_->Send(members[i], Channel::kControl, tag, buffer));
  } else {
    PPFT_ASSIGN_OR_RETURN(const Ticket ticket, host_->PostReceive(members[0], Channel::kControl, tag, buffer));
    PPFT_RETURN_IF_ERROR(host_->Wait(ticket));
  }
  // Not joined after the deadline: nothing ends a communicator that has not come about.
  using Made = std::pair<std::unique_ptr<DeviceComm>, std::string>;
  auto promise = std::make_shared<std::promise<Made>>();
  std::future<Made> future = promise->get_future();
  std::thread([promise, comms = comms_, id, size = static_cast<int>(members.size()), me] {
    try {
      promise->set_value({comms->Make(*id, size, me), ""});
    } catch (const std::exception& e) {
      promise->set_value({nullptr, e.what()});
    }
  }).detach();
  const int peer = members[me == 0 ? 1 : 0];
  const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoMilliseconds(timeout);
  while (future.wait_for(kWatchInterval) != std::future_status::ready) {
    PPFT_RETURN_IF_ERROR(host_->status());
    if (std::chrono::steady_clock::now() < deadline) continue;
    return WithPeer(absl::DeadlineExceededError(absl::StrCat(what, " did not come about within ", absl::FormatDuration(timeout),
                                                             ": check that the devices' hosts reach each other (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)")),
                    peer);
  }
  Made made = future.get();
  if (made.first == nullptr) return WithPeer(absl::UnavailableError(absl::StrCat(what, ": ", made.second)), peer);
  return std::move(made.first);
}

absl::Status DeviceTransportImpl::MakeComms(const DeviceTransportOptions& options) {
  std::vector<DeviceLink> links = options.links;
  std::sort(links.begin(), links.end(), [](const DeviceLink& a, const DeviceLink& b) { return OrderOf(a) < OrderOf(b); });
  for (const DeviceLink& link : links) {
    // Equal on both ends.
    const int number = (link.from * size() + link.to) * kNumChannels + static_cast<int>(link.channel);
    const std::string what = absl::StrCat("the communicator of ranks ", link.from, " and ", link.to);
    PPFT_ASSIGN_OR_RETURN(std::unique_ptr<DeviceComm> comm, MakeComm({link.from, link.to}, number, options.init_timeout, what));
    Lane lane;
    lane.link = link;
    lane.comm = std::move(comm);
    lanes_.push_back(std::move(lane));
  }
  if (options.group.size() > 1) {
    group_index_ = static_cast<int>(std::find(options.group.begin(), options.group.end(), rank()) - options.group.begin());
    if (options.group.size() == 2) group_peer_ = options.group[static_cast<size_t>(1 - group_index_)];
    PPFT_ASSIGN_OR_RETURN(group_, MakeComm(options.group, size() * size() * kNumChannels + options.group[0], options.init_timeout,
                                           absl::StrCat("the communicator of ", options.group.size(), " replicas")));
  }
  watcher_ = std::thread([this] { Watch(); });
  return absl::OkStatus();
}

absl::Status DeviceTransportImpl::FirstCause() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return status_.ok() ? host_->status() : status_;
}

absl::Status DeviceTransportImpl::AskComms() const {
  for (const Lane& lane : lanes_) {
    const std::string error = lane.comm->AsyncError();
    const int peer = lane.link.from == rank() ? lane.link.to : lane.link.from;
    if (!error.empty()) return WithPeer(absl::UnavailableError(absl::StrCat("transfer with the device of rank ", peer, ": ", error)), peer);
  }
  if (group_ == nullptr) return absl::OkStatus();
  const std::string error = group_->AsyncError();
  if (error.empty()) return absl::OkStatus();
  const absl::Status status = absl::UnavailableError(absl::StrCat("transfer between the replicas' devices: ", error));
  return group_peer_ < 0 ? status : WithPeer(status, group_peer_);
}

absl::Status DeviceTransportImpl::status() const {
  PPFT_RETURN_IF_ERROR(FirstCause());
  const absl::Status asked = AskComms();
  PPFT_RETURN_IF_ERROR(FirstCause());  // an abort in between, and with it why
  return asked;
}

template <typename Body>
absl::Status DeviceTransportImpl::Guarded(int peer, Body&& body) {
  try {
    body();
    return absl::OkStatus();
  } catch (const std::exception& e) {
    PPFT_RETURN_IF_ERROR(FirstCause());
    absl::Status failed = absl::UnavailableError(absl::StrCat("transfer between devices: ", e.what()));
    return peer >= 0 ? WithPeer(failed, peer) : failed;
  }
}

absl::StatusOr<DeviceTransportImpl::Lane*> DeviceTransportImpl::Find(Channel channel, int from, int to) {
  for (Lane& lane : lanes_) {
    if (lane.link.channel == channel && lane.link.from == from && lane.link.to == to) return &lane;
  }
  return absl::InternalError(absl::StrCat("no link from rank ", from, " to rank ", to, " on channel ", static_cast<int>(channel)));
}

void DeviceTransportImpl::Forget(Lane* lane) {
  while (!lane->under_way.empty() && lane->comm->Done(lane->under_way.front().operation)) lane->under_way.pop_front();
}

void DeviceTransportImpl::Pass(Lane* lane, uint64_t operation) {
  lane->comm->WaitOnStream(operation);
  while (!lane->under_way.empty() && lane->under_way.front().operation <= operation) lane->under_way.pop_front();
}

void DeviceTransportImpl::QueuePosted(Lane* lane, size_t count) {
  Forget(lane);
  for (; count > 0; --count) {
    Posted posted = std::move(lane->posted.front());
    lane->posted.pop_front();
    const uint64_t operation = lane->comm->Receive(posted.buffer.data, posted.buffer.bytes, /*member=*/0);
    queued_[posted.ticket] = {lane, operation};
    lane->under_way.push_back({operation, std::move(posted.buffer.owner)});
  }
}

absl::StatusOr<Ticket> DeviceTransportImpl::PostReceive(int peer, Channel channel, const Tag& tag, Buffer buffer) {
  if (channel == Channel::kControl) {
    PPFT_ASSIGN_OR_RETURN(const Ticket ticket, host_->PostReceive(peer, channel, tag, std::move(buffer)));
    return HostTicket(ticket);
  }
  PPFT_RETURN_IF_ERROR(FirstCause());
  PPFT_ASSIGN_OR_RETURN(Lane * lane, Find(channel, peer, rank()));
  const Ticket ticket = next_ticket_;
  next_ticket_ += 2;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    counts_.received_bytes += buffer.bytes;
  }
  lane->posted.push_back({ticket, std::move(buffer)});
  return ticket;
}

absl::Status DeviceTransportImpl::Send(int peer, Channel channel, const Tag& tag, Buffer buffer) {
  if (channel == Channel::kControl) return host_->Send(peer, channel, tag, std::move(buffer));
  PPFT_RETURN_IF_ERROR(FirstCause());
  PPFT_ASSIGN_OR_RETURN(Lane * lane, Find(channel, rank(), peer));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    counts_.sent_bytes += buffer.bytes;
  }
  return Guarded(peer, [&] {
    Forget(lane);
    // The host is far ahead of the device: without this all messages of a step would be held at once.
    if (lane->under_way.size() >= sends_held_) Pass(lane, lane->under_way[lane->under_way.size() - sends_held_].operation);
    const uint64_t operation = lane->comm->Send(buffer.data, buffer.bytes, /*member=*/1);
    lane->under_way.push_back({operation, std::move(buffer.owner)});
  });
}

absl::Status DeviceTransportImpl::Wait(Ticket ticket) {
  if (IsHost(ticket)) return host_->Wait(ticket / 2);
  PPFT_RETURN_IF_ERROR(FirstCause());
  const auto waited_for = [ticket](const Posted& posted) { return posted.ticket == ticket; };
  Lane* lane = nullptr;
  for (Lane& each : lanes_) {
    if (std::any_of(each.posted.begin(), each.posted.end(), waited_for)) lane = &each;
  }
  if (const auto queued = queued_.find(ticket); queued != queued_.end()) lane = queued->second.first;
  if (lane == nullptr) return absl::InternalError("waiting for a receive that was not posted");
  return Guarded(lane->link.from, [&] {
    const auto mine = std::find_if(lane->posted.begin(), lane->posted.end(), waited_for);
    if (mine != lane->posted.end()) QueuePosted(lane, static_cast<size_t>(mine - lane->posted.begin()) + 1);
    const auto queued = queued_.find(ticket);
    Pass(lane, queued->second.second);
    queued_.erase(queued);
  });
}

absl::Status DeviceTransportImpl::Close() {
  StopWatching();
  PPFT_RETURN_IF_ERROR(status());
  return host_->Close();
}

TransferCounts DeviceTransportImpl::counts() const {
  TransferCounts counts = host_->counts();
  std::lock_guard<std::mutex> lock(mutex_);
  counts.sent_bytes += counts_.sent_bytes;
  counts.received_bytes += counts_.received_bytes;
  return counts;
}

void DeviceTransportImpl::Fail(const absl::Status& cause) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!status_.ok()) return;
    status_ = cause;  // before the device goes on with garbage
  }
  host_->Abort(cause);
  std::vector<DeviceComm*> all;
  for (const Lane& lane : lanes_) all.push_back(lane.comm.get());
  if (group_ != nullptr) all.push_back(group_.get());
  try {
    if (!all.empty()) comms_->Abort(all);
  } catch (const std::exception&) {
    // The process ends with `cause`; the driver takes back what is left.
  }
}

void DeviceTransportImpl::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kWatchInterval, [this] { return stopping_; })) {
    if (!status_.ok()) return;
    lock.unlock();
    absl::Status cause = host_->status();
    if (cause.ok()) cause = AskComms();
    if (!cause.ok()) return Fail(cause);
    lock.lock();
  }
}

void DeviceTransportImpl::StopWatching() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (watcher_.joinable()) watcher_.join();
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceTransport>> DeviceTransport::Connect(std::unique_ptr<Transport> host, DeviceComms* comms,
                                                                          const DeviceTransportOptions& options) {
  auto transport = std::make_unique<DeviceTransportImpl>(std::move(host), comms, options.sends_held);
  PPFT_RETURN_IF_ERROR(transport->MakeComms(options));
  return std::unique_ptr<DeviceTransport>(std::move(transport));
}

}  // namespace ppft::trainer
