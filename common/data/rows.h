// Untrusted dataset files, row by row: JSON Lines, or one JSON array of objects. Every complaint names `source: row N: field F`, what is wrong and
// what to do. Used by ppft-prepare and, with the same sentences, by ppctl before an upload.
//
// Row N is line N of a JSON Lines file, from 1: blank lines are skipped but counted, so that N is what an editor shows. In a JSON array it is the
// N-th element. Pure: bytes in; memory holds one row. One thread at a time.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft::data {

constexpr int64_t kMaxRowBytes = int64_t{16} << 20;
constexpr int kMaxRowNesting = 64;

enum class Format { kSummarization, kPromptCompletion, kCompletion };

// How to read one file.
struct RowFormat {
  std::string source;  // the user's name for it
  Format format = Format::kSummarization;
  std::string context_key;  // key of document or prompt; empty for completion
  std::string answer_key;   // key of summary, completion or text
};

// field_map: role -> key; roles that are not there have their own name as key. INVALID_ARGUMENT: unknown type or role.
absl::StatusOr<RowFormat> MakeRowFormat(absl::string_view source, absl::string_view type, const std::map<std::string, std::string>& field_map);

struct Row {
  int64_t number = 0;   // in the file, from 1
  std::string context;  // document or prompt, UTF-8; may be empty
  std::string answer;   // summary, completion or text, UTF-8; never empty
};

class RowReader {
 public:
  // `bytes` must outlive the reader.
  RowReader(absl::string_view bytes, RowFormat format);

  // False at the end. After an error the reader is spent.
  absl::StatusOr<bool> Next(Row* row);

 private:
  absl::StatusOr<bool> NextLine(absl::string_view* text);
  absl::StatusOr<bool> NextElement(absl::string_view* text);

  RowFormat format_;
  absl::string_view rest_;
  bool is_array_ = false;
  bool array_ended_ = false;
  int64_t number_ = 0;  // of the row read last
};

// What a file's rows hold, in bytes of text.
struct RowTotals {
  int64_t rows = 0;
  int64_t context_bytes = 0;
  int64_t answer_bytes = 0;
};

// Reads the whole file. INVALID_ARGUMENT: the first bad row, or a file without rows.
absl::StatusOr<RowTotals> MeasureRows(absl::string_view source, absl::string_view bytes, absl::string_view type,
                                      const std::map<std::string, std::string>& field_map);

// "source: the dataset is empty: …"
absl::Status EmptyDatasetError(absl::string_view source);
// "source: row N: …"
absl::Status RowError(absl::string_view source, int64_t row, absl::string_view what);

// Offset of the first byte that does not belong to well-formed UTF-8 (no surrogates, no overlong forms), or npos.
size_t FindInvalidUtf8(absl::string_view text);

}  // namespace ppft::data
