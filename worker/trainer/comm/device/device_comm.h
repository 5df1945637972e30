// Transfers between the devices of a gang, as the CUDA plugin makes them with NCCL. One communicator is one stream of its own: its operations run one after
// another, beside the computation. Nothing waits on the host.
//
// Errors: std::runtime_error. Thread: one at a time, the one whose current stream computes, but for what says otherwise.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ppft::trainer {

// Made by one member and carried to the others by whatever channel there is.
using DeviceCommId = std::array<char, 128>;

class DeviceComm {
 public:
  // Does not wait for what is under way.
  virtual ~DeviceComm() = default;

  // Each operation starts after what is queued on the caller's current stream and gets a number, from 1.
  // To and from a member; both ends name them in the same order.
  virtual uint64_t Send(const void* data, int64_t bytes, int member) = 0;
  virtual uint64_t Receive(void* data, int64_t bytes, int member) = 0;
  // Collectives in place over fp32 values; member i owns [bounds[i], bounds[i + 1]). All members call the same ones in the same order.
  virtual uint64_t AllReduceSum(float* values, int64_t count) = 0;
  virtual uint64_t ReduceScatter(float* values, const std::vector<int64_t>& bounds) = 0;
  virtual uint64_t AllGather(float* values, const std::vector<int64_t>& bounds) = 0;

  // The caller's current stream goes on after that operation.
  virtual void WaitOnStream(uint64_t operation) = 0;
  // It has left the device: its memory may be used again. An aborted operation is done, too.
  virtual bool Done(uint64_t operation) = 0;

  // Any thread: what went wrong by itself; "" while all is well.
  virtual std::string AsyncError() = 0;
};

class DeviceComms {
 public:
  virtual ~DeviceComms() = default;

  virtual DeviceCommId NewId() = 0;
  // Blocks until all members are there. Any thread, which then uses the device.
  virtual std::unique_ptr<DeviceComm> Make(const DeviceCommId& id, int size, int member) = 0;
  // Any thread: ends what is under way on all of them, as one group. Their operations then finish without an error and with garbage, and nothing else may be
  // asked of them.
  virtual void Abort(const std::vector<DeviceComm*>& comms) = 0;
};

}  // namespace ppft::trainer
