#include "worker/trainer/cuda/cuda_timer.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <deque>
#include <memory>

#include "worker/trainer/kernels/cuda/launch.h"

namespace ppft::trainer::cuda {
namespace {

class CudaTimer final : public DeviceTimer {
 public:
  ~CudaTimer() override {
    for (const cudaEvent_t event : marks_) cudaEventDestroy(event);
    for (const cudaEvent_t event : free_) cudaEventDestroy(event);
    if (last_ != nullptr) cudaEventDestroy(last_);
  }

  void Mark() override {
    cudaEvent_t event = nullptr;
    if (free_.empty()) {
      Check(cudaEventCreate(&event), "cudaEventCreate");
    } else {
      event = free_.back();
      free_.pop_back();
    }
    marks_.push_back(event);
    Check(cudaEventRecord(event, c10::cuda::getCurrentCUDAStream()), "cudaEventRecord");
  }

  // From mark to mark: a float of milliseconds has no room for microseconds over a long time.
  std::vector<int64_t> Collect() override {
    std::vector<int64_t> reached;
    while (!marks_.empty()) {
      const cudaError_t state = cudaEventQuery(marks_.front());
      if (state == cudaErrorNotReady) {
        cudaGetLastError();  // no error; later calls shall not find it
        break;
      }
      Check(state, "a device's mark");
      if (last_ != nullptr) {
        float milliseconds = 0;
        Check(cudaEventElapsedTime(&milliseconds, last_, marks_.front()), "cudaEventElapsedTime");
        nanoseconds_ += std::llround(static_cast<double>(milliseconds) * 1e6);
        free_.push_back(last_);
      }
      last_ = marks_.front();
      marks_.pop_front();
      reached.push_back(nanoseconds_);
    }
    return reached;
  }

  void Wait() override {
    if (!marks_.empty()) Check(cudaEventSynchronize(marks_.back()), "cudaEventSynchronize");
  }

 private:
  std::deque<cudaEvent_t> marks_;  // not reached yet, as far as Collect knows
  std::vector<cudaEvent_t> free_;
  cudaEvent_t last_ = nullptr;  // the newest that was reached
  int64_t nanoseconds_ = 0;     // of last_
};

}  // namespace

std::unique_ptr<DeviceTimer> MakeCudaTimer() { return std::make_unique<CudaTimer>(); }

}  // namespace ppft::trainer::cuda
