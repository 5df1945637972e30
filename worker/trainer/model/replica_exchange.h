// What a stage asks of its replicas: the ranks that hold the same layers (ZeRO 2 and 3). All of them begin and finish the same operations in the same
// order; one gathering and one sum may be under way at once, beside the computation.
//
// Thread: the one that computes. Errors: those of the transport; after one the object is spent.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace ppft::trainer {

class ReplicaExchange {
 public:
  virtual ~ReplicaExchange() = default;

  virtual int size() const = 0;
  virtual int index() const = 0;

  // whole: [size() * n] contiguous; part: [n], this replica's. Afterwards elements [i n, (i + 1) n) of whole hold replica i's part. Neither may change before
  // the end.
  virtual absl::Status BeginGather(const at::Tensor& part, const at::Tensor& whole) = 0;
  virtual absl::Status EndGather() = 0;

  // values: [n] fp32 contiguous, replica i answers for [bounds[i], bounds[i + 1]). The sum of this replica's part over all replicas is added to `sum`, in
  // the order of the replicas. `values` may be spoiled and must not change before the end.
  virtual absl::Status BeginSum(const at::Tensor& values, const std::vector<int64_t>& bounds, const at::Tensor& sum) = 0;
  virtual absl::Status EndSum() = 0;
};

}  // namespace ppft::trainer
