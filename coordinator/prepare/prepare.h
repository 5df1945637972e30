// The work of ppft-prepare: dataset files to token files, a preview of them, and the check of a model folder's tokenizer.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/prepare/request.h"
#include "coordinator/prepare/row_tokenizer.h"
#include "coordinator/prepare/spool.h"

namespace ppft::coordinator::prepare {

struct Prepared {
  Counts train;
  std::optional<Counts> eval;
};

struct PreviewRow {
  std::string source;
  TokenizedRow row;  // with text and tokens
};

// The folder's tokenizer, if it loads, all its ids are below vocab_size and it has an end token. MODEL_INVALID or TOKENIZER_MISMATCH.
absl::StatusOr<std::unique_ptr<text::Tokenizer>> LoadTokenizer(const std::string& folder, int64_t vocab_size);

// Writes the request's outputs: both or none. Rows are tokenised by request.threads threads and stored in their order; the same request gives the
// same bytes.
absl::StatusOr<Prepared> Prepare(const Request& request, const text::Tokenizer& tokenizer);

// The first num_rows rows that are not dropped.
absl::StatusOr<std::vector<PreviewRow>> Preview(const Request& request, const text::Tokenizer& tokenizer, int64_t num_rows);

}  // namespace ppft::coordinator::prepare
