// Which devices carry which ranks. PURE and deterministic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ppft::coordinator {

// A device that ranks may be laid on.
struct PlanDevice {
  std::string worker;
  std::string id;              // "cpu:0"
  std::string kind;            // cpu | cuda
  int64_t memory_bytes = 0;    // what a rank may use; 0 = not known, taken as enough
  int32_t threads = 1;         // CPU: compute threads of the slot
  bool deterministic = false;  // cuda: its worker promises the same bits in every layout
  bool flash = false;          // cuda: attention there goes through flash, for cuDNN's does not serve (worker/trainer/cuda/attention.cc)
};

// By worker, then by number of the device ("cpu:2" before "cpu:10").
std::vector<PlanDevice> Sorted(std::vector<PlanDevice> devices);

// `data_parallel_size` x `pipeline_size` devices in rank order; empty when there are fewer. The whole job goes on one worker if one has room (the one
// with the least room that suffices), else each replica, else a replica is spread over the workers with the most room; neighbours in the pipeline stay
// together.
std::vector<PlanDevice> ChooseDevices(const std::vector<PlanDevice>& devices, int data_parallel_size, int pipeline_size);

}  // namespace ppft::coordinator
