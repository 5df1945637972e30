// Passes of a stage that come again with the same shapes over the same buffers: done twice as they are, then captured, then launched as a whole.
//
// Thread: one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "worker/trainer/kernels/kernels.h"

namespace ppft::trainer {

// All that the launches of a pass depend on but for the contents of its buffers.
using PassKey = std::vector<int64_t>;

class CapturedPasses {
 public:
  // Not enabled: passes are done as they are.
  CapturedPasses(Kernels& kernels, bool enabled) : kernels_(kernels), enabled_(enabled) {}

  // Does `pass`, or launches what it launched before. `generation` changes whenever a buffer moves; `after` gives it once the pass is done. Errors are those of
  // `pass`; where capturing fails, passes are done as they are from then on.
  absl::Status Run(const PassKey& key, int64_t generation, const std::function<absl::Status()>& pass, const std::function<int64_t()>& after);
  // Gives the captured passes' memory back.
  void Clear();
  int64_t launches() const { return launches_; }  // of captured passes, so far

 private:
  absl::Status Launch(CapturedWork& work);

  struct Entry {
    int done = 0;
    std::unique_ptr<CapturedWork> work;
  };

  Kernels& kernels_;
  bool enabled_;
  int64_t generation_ = -1;
  size_t captured_ = 0;
  int64_t launches_ = 0;
  std::map<PassKey, Entry> entries_;
};

}  // namespace ppft::trainer
