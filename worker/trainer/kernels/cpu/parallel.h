// ATen's thread pool for loops. The only file that needs the OpenMP flag is parallel.cc: without it at::parallel_for runs serially.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

namespace ppft::trainer::cpu {

// body(begin, end) over disjoint parts of [begin, end), at least `grain` items each. Parts depend on the thread count: reduce inside one item only.
void ParallelFor(int64_t begin, int64_t end, int64_t grain, c10::function_ref<void(int64_t, int64_t)> body);

}  // namespace ppft::trainer::cpu
