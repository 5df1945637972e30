// The token file: what ppft-prepare writes and trainers map. A safetensors file with ids U32 [tokens], supervised U8 [tokens], offsets I64 [rows + 1],
// rows I64 [rows] (row number in the source file, from 1) and its provenance in __metadata__. Pure: bytes in, views out; any thread.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace ppft::data {

// A view of tokenised rows; row i is tokens [offsets[i], offsets[i + 1]).
struct TokenRows {
  absl::Span<const uint32_t> ids;        // [tokens]
  absl::Span<const uint8_t> supervised;  // [tokens], 0 or 1
  absl::Span<const int64_t> offsets;     // [rows + 1], from 0 to tokens, strictly ascending: no row is empty
  absl::Span<const int64_t> rows;        // [rows], row in the source file, from 1

  int64_t num_rows() const { return static_cast<int64_t>(rows.size()); }
  int64_t num_tokens() const { return static_cast<int64_t>(ids.size()); }
  int64_t length(int64_t row) const { return offsets[row + 1] - offsets[row]; }
  // Tokens t >= 1 of the row with supervised[t] = 1: each is predicted from t - 1.
  int64_t targets(int64_t row) const;
};

struct TokenFile {
  TokenRows rows;                               // views into the bytes given to ParseTokenFile
  std::map<std::string, std::string> metadata;  // __metadata__
};

// `bytes` (for example a mapping of the file) must outlive the result and start at an address divisible by 8. Everything is checked, the values
// of offsets and supervised too. DATA_LOSS names what is wrong.
absl::StatusOr<TokenFile> ParseTokenFile(absl::string_view bytes);

// Everything up to the first tensor's bytes. The tensors follow in this order without gaps: offsets, rows, ids, supervised.
std::string TokenFileHeader(int64_t num_rows, int64_t num_tokens, const std::map<std::string, std::string>& metadata);

}  // namespace ppft::data
