// One row to tokens and supervision, as training sees it. The rule (also for reading it from the outside):
//   summarization      instruction_prefix + document + response_prefix + summary
//   prompt_completion  prompt + completion
//   completion         text
// is tokenised once, as a whole, with the BOS that the tokenizer adds; one EOS is appended unless the tokenizer did. Supervised are the tokens that
// begin at or after the first byte of summary or completion (of a completion row all but BOS), and the EOS unless train_on_eos is none.
//
// A row of more than sequence_len tokens is dropped, refused, or truncated: the document loses its end and the prompt its beginning (what stands
// next to the answer stays), as whole characters, and the shorter text is tokenised anew; the answer is never cut. A completion row keeps its first
// sequence_len tokens and gets no EOS, because its text did not end there.
// Thread: const methods from any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/data/rows.h"
#include "common/text/tokenizer.h"
#include "coordinator/prepare/request.h"

namespace ppft::coordinator::prepare {

struct TokenizedRow {
  int64_t number = 0;  // in its source file
  std::vector<uint32_t> ids;
  std::vector<uint8_t> supervised;
  int32_t targets = 0;
  bool truncated = false;
  bool dropped = false;  // too long: ids is empty
  // Only from Tokenize with keep_text.
  std::string text;                 // after truncation
  std::vector<text::Token> tokens;  // as many as ids; the EOS as an added one
};

class RowTokenizer {
 public:
  // `tokenizer` has an EOS and must outlive this.
  RowTokenizer(const text::Tokenizer& tokenizer, const DataOptions& options);

  // INVALID_ARGUMENT "source: row N: …".
  absl::StatusOr<TokenizedRow> Tokenize(const data::RowFormat& format, const data::Row& row, bool keep_text = false) const;

 private:
  // The text of a row with `context` bytes [begin, end) left of its document or prompt.
  struct Rendered {
    std::string text;
    size_t context_begin = 0;  // of the document or prompt in `text`
    size_t context_end = 0;
    size_t boundary = 0;
  };
  struct Encoded {
    Rendered rendered;
    std::vector<text::Token> tokens;
    bool ends_in_eos = false;

    int64_t length() const { return static_cast<int64_t>(tokens.size()) + (ends_in_eos ? 0 : 1); }
  };

  Rendered Render(const data::RowFormat& format, absl::string_view context, absl::string_view answer) const;
  absl::StatusOr<Encoded> Encode(Rendered rendered) const;
  absl::StatusOr<bool> IsTooLong(const Rendered& rendered) const;
  absl::StatusOr<Encoded> Truncate(const data::RowFormat& format, const data::Row& row, bool* truncated) const;
  absl::StatusOr<TokenizedRow> Label(const data::RowFormat& format, const data::Row& row, Encoded encoded, bool truncated, bool keep_text) const;

  const text::Tokenizer& tokenizer_;
  const DataOptions options_;
  const size_t max_bytes_;  // no text of more bytes fits into sequence_len tokens
  const uint32_t eos_;
};

}  // namespace ppft::coordinator::prepare
