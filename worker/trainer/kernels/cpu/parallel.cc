#include "worker/trainer/kernels/cpu/parallel.h"

#include <ATen/Parallel.h>

namespace ppft::trainer::cpu {

void ParallelFor(int64_t begin, int64_t end, int64_t grain, c10::function_ref<void(int64_t, int64_t)> body) {
  at::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(from, to); });
}

}  // namespace ppft::trainer::cpu
