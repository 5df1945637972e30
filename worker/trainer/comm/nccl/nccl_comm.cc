// Blocking communicators: on a non-blocking one each launch costs 40 to 60 microseconds more.
#include "worker/trainer/comm/nccl/nccl_comm.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "worker/trainer/kernels/cuda/launch.h"

namespace ppft::trainer::cuda {
namespace {

static_assert(sizeof(ncclUniqueId) == sizeof(DeviceCommId));

// How long an abort waits for a call that is being queued; such a call may itself wait for the peer.
constexpr std::chrono::seconds kAbortGrace(1);

void CheckNccl(ncclResult_t result, const char* what) {
  if (result == ncclSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + ncclGetErrorString(result) + ", " + ncclGetLastError(nullptr));
}

class NcclComm final : public DeviceComm {
 public:
  NcclComm(const DeviceCommId& id, int size, int member, int device) : size_(size), member_(static_cast<size_t>(member)) {
    Check(cudaSetDevice(device), "cudaSetDevice");
    int least = 0, greatest = 0;
    Check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
    Check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "stream");
    Check(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming), "event");
    ncclUniqueId nccl_id;
    std::memcpy(&nccl_id, id.data(), id.size());
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    CheckNccl(ncclCommInitRankConfig(&comm_, size, nccl_id, member, &config), "ncclCommInitRank");
  }
  ~NcclComm() override { Abort(); }

  uint64_t Send(const void* data, int64_t bytes, int member) override {
    return Run([&] { CheckNccl(ncclSend(data, static_cast<size_t>(bytes), ncclInt8, member, comm_, stream_), "ncclSend"); });
  }
  uint64_t Receive(void* data, int64_t bytes, int member) override {
    return Run([&] { CheckNccl(ncclRecv(data, static_cast<size_t>(bytes), ncclInt8, member, comm_, stream_), "ncclRecv"); });
  }
  uint64_t AllReduceSum(float* values, int64_t count) override {
    return Run([&] { CheckNccl(ncclAllReduce(values, values, static_cast<size_t>(count), ncclFloat, ncclSum, comm_, stream_), "ncclAllReduce"); });
  }
  // NCCL's own reduce-scatter and all-gather know equal parts only.
  uint64_t ReduceScatter(float* values, const std::vector<int64_t>& bounds) override {
    return Run([&] {
      if (const size_t part = EqualPart(bounds); part > 0) {
        return CheckNccl(ncclReduceScatter(values, values + member_ * part, part, ncclFloat, ncclSum, comm_, stream_), "ncclReduceScatter");
      }
      ForEachPart(bounds, [&](int64_t begin, size_t count, int member) {
        CheckNccl(ncclReduce(values + begin, values + begin, count, ncclFloat, ncclSum, member, comm_, stream_), "ncclReduce");
      });
    });
  }
  uint64_t AllGather(float* values, const std::vector<int64_t>& bounds) override {
    return Run([&] {
      if (const size_t part = EqualPart(bounds); part > 0) {
        return CheckNccl(ncclAllGather(values + member_ * part, values, part, ncclFloat, comm_, stream_), "ncclAllGather");
      }
      ForEachPart(bounds, [&](int64_t begin, size_t count, int member) {
        CheckNccl(ncclBroadcast(values + begin, values + begin, count, ncclFloat, member, comm_, stream_), "ncclBroadcast");
      });
    });
  }

  void WaitOnStream(uint64_t operation) override {
    if (operation < first_) return;  // done and forgotten
    Check(cudaStreamWaitEvent(c10::cuda::getCurrentCUDAStream(), events_.at(operation - first_), 0), "cudaStreamWaitEvent");
  }

  bool Done(uint64_t operation) override {
    if (operation < first_) return true;
    const cudaError_t state = cudaEventQuery(events_.at(operation - first_));
    if (state == cudaErrorNotReady) return false;
    Check(state, "a transfer");
    return true;
  }

  std::string AsyncError() override {
    const std::unique_lock<std::timed_mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || aborted_) return "";
    ncclResult_t state = ncclSuccess;
    if (ncclCommGetAsyncError(comm_, &state) != ncclSuccess || state == ncclSuccess || state == ncclInProgress) return "";
    return std::string(ncclGetErrorString(state)) + ", " + ncclGetLastError(comm_);
  }

  // Any thread, once.
  void Abort() {
    const std::unique_lock<std::timed_mutex> lock(mutex_, kAbortGrace);
    if (aborted_.exchange(true)) return;
    ncclCommAbort(comm_);
  }

 private:
  template <typename Body>
  uint64_t Run(Body&& body) {
    Check(cudaEventRecord(ready_, c10::cuda::getCurrentCUDAStream()), "cudaEventRecord");
    Check(cudaStreamWaitEvent(stream_, ready_, 0), "cudaStreamWaitEvent");
    {
      const std::lock_guard<std::timed_mutex> lock(mutex_);
      if (aborted_) throw std::runtime_error("the communicator was aborted");
      body();
    }
    const cudaEvent_t event = FreeEvent();
    Check(cudaEventRecord(event, stream_), "cudaEventRecord");
    events_.push_back(event);
    return first_ + events_.size() - 1;
  }

  // The size of all parts if it is one and they begin at 0, else 0.
  static size_t EqualPart(const std::vector<int64_t>& bounds) {
    for (size_t i = 0; i < bounds.size(); ++i) {
      if (bounds[i] != static_cast<int64_t>(i) * bounds.at(1)) return 0;
    }
    return static_cast<size_t>(bounds.at(1));
  }

  template <typename Body>
  void ForEachPart(const std::vector<int64_t>& bounds, Body&& body) {
    CheckNccl(ncclGroupStart(), "ncclGroupStart");
    for (int i = 0; i < size_; ++i) {
      const int64_t count = bounds.at(static_cast<size_t>(i) + 1) - bounds.at(static_cast<size_t>(i));
      if (count > 0) body(bounds[static_cast<size_t>(i)], static_cast<size_t>(count), i);
    }
    CheckNccl(ncclGroupEnd(), "ncclGroupEnd");
  }

  cudaEvent_t FreeEvent() {
    if (!events_.empty() && cudaEventQuery(events_.front()) == cudaSuccess) {
      const cudaEvent_t event = events_.front();
      events_.pop_front();
      ++first_;
      return event;
    }
    cudaEvent_t event = nullptr;
    Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
    return event;
  }

  const int size_;
  const size_t member_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ready_ = nullptr;
  std::deque<cudaEvent_t> events_;  // of the operations from first_ on
  uint64_t first_ = 1;

  std::timed_mutex mutex_;  // a call on comm_ is being made
  std::atomic<bool> aborted_ = false;
  ncclComm_t comm_ = nullptr;
};

class NcclComms final : public DeviceComms {
 public:
  explicit NcclComms(int device) : device_(device) {}

  DeviceCommId NewId() override {
    ncclUniqueId nccl_id;
    CheckNccl(ncclGetUniqueId(&nccl_id), "ncclGetUniqueId");
    DeviceCommId id;
    std::memcpy(id.data(), &nccl_id, id.size());
    return id;
  }

  std::unique_ptr<DeviceComm> Make(const DeviceCommId& id, int size, int member) override { return std::make_unique<NcclComm>(id, size, member, device_); }

  void Abort(const std::vector<DeviceComm*>& comms) override {
    Check(cudaSetDevice(device_), "cudaSetDevice");
    CheckNccl(ncclGroupStart(), "ncclGroupStart");
    for (DeviceComm* comm : comms) static_cast<NcclComm*>(comm)->Abort();
    CheckNccl(ncclGroupEnd(), "ncclGroupEnd");
  }

 private:
  const int device_;
};

}  // namespace

std::unique_ptr<DeviceComms> MakeNcclComms(int device) { return std::make_unique<NcclComms>(device); }

}  // namespace ppft::trainer::cuda
