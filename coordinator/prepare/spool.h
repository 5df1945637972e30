// Tokenised rows on their way to a token file: tokens in unlinked temporary files beside the output, one small entry per row in memory.
// One thread. Errors are those of the file system.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/files.h"
#include "coordinator/prepare/row_tokenizer.h"

namespace ppft::coordinator::prepare {

struct Counts {
  int64_t rows = 0;
  int64_t tokens = 0;
  int64_t targets = 0;
  int64_t truncated = 0;
  int64_t dropped = 0;
  int64_t max_length = 0;  // tokens of the longest row
};

class Spool {
 public:
  // The temporary files lie beside `path` and have no name from the start: a crash leaves nothing.
  static absl::StatusOr<Spool> Create(const std::string& path);

  absl::Status Add(const TokenizedRow& row);
  int64_t num_rows() const { return static_cast<int64_t>(entries_.size()); }
  int64_t num_dropped() const { return dropped_; }

  // Writes the chosen rows (indices, ascending) as a token file at `path`, synced; num_dropped() is not in the counts.
  absl::StatusOr<Counts> Write(const std::vector<int64_t>& chosen, const std::map<std::string, std::string>& metadata, const std::string& path);

 private:
  struct Entry {
    int64_t number;  // row in the source file
    int64_t begin;   // first token
    int32_t length;
    int32_t targets;
    bool truncated;
  };
  // Appends in large pieces.
  struct Stream {
    Fd fd;
    std::string buffer;
    absl::Status Append(absl::string_view bytes);
    absl::Status Flush();
  };

  static absl::Status CopyRange(const Stream& from, int64_t begin, int64_t size, Stream* to);

  Stream ids_;
  Stream supervised_;
  std::vector<Entry> entries_;
  int64_t num_tokens_ = 0;
  int64_t dropped_ = 0;
};

}  // namespace ppft::coordinator::prepare
