#include "common/data/rows.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"

namespace ppft::data {
namespace {

using Json = nlohmann::json;

struct FormatNames {
  const char* type;
  Format format;
  const char* context_role;  // "" if there is none
  const char* answer_role;
};
constexpr FormatNames kFormats[] = {{"summarization", Format::kSummarization, "document", "summary"},
                                    {"prompt_completion", Format::kPromptCompletion, "prompt", "completion"},
                                    {"completion", Format::kCompletion, "", "text"}};

constexpr absl::string_view kJsonSpace = " \t\r\n";

bool IsBlank(absl::string_view text) { return text.find_first_not_of(kJsonSpace) == absl::string_view::npos; }

// A key or value of the user's file, safe to print.
std::string Quoted(absl::string_view text, size_t limit = 40) {
  const bool cut = text.size() > limit;
  std::string shown = Json(std::string(text.substr(0, limit))).dump(-1, ' ', true, Json::error_handler_t::replace);
  return cut ? absl::StrCat(shown, "…") : shown;
}

size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

// The keys that are there, and the one that was perhaps meant.
std::string MissingField(const Json& row, const std::string& key) {
  std::vector<std::string> keys;
  std::string nearest;
  size_t best = std::max<size_t>(2, key.size() / 3) + 1;
  for (const auto& [name, value] : row.items()) {
    if (keys.size() < 10) keys.push_back(Quoted(name));
    const size_t distance = name.size() > 64 ? best : EditDistance(absl::AsciiStrToLower(name), absl::AsciiStrToLower(key));
    if (distance < best) {
      best = distance;
      nearest = name;
    }
  }
  if (row.size() > keys.size()) keys.push_back("…");
  const std::string meant = nearest.empty() ? "" : absl::StrCat("did you mean ", Quoted(nearest), "? ");
  const std::string there = keys.empty() ? "no keys" : absl::StrCat("the keys ", absl::StrJoin(keys, ", "));
  return absl::StrCat("field ", key, " is missing (", meant, "the row has ", there, "): add it, or name the right key in field_map");
}

const char* TypeName(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::object:
      return "an object";
    case Json::value_t::array:
      return "a list";
    case Json::value_t::string:
      return "a string";
    case Json::value_t::boolean:
      return "a boolean";
    default:
      return "a number";
  }
}

// Walks through JSON text by brackets and quotes alone; what is inside is for the parser to judge.
class BracketScan {
 public:
  void Take(char c) {
    if (in_string_) {
      if (escaped_) {
        escaped_ = false;
      } else if (c == '\\') {
        escaped_ = true;
      } else if (c == '"') {
        in_string_ = false;
      }
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '[' || c == '{') {
      deepest_ = std::max(deepest_, ++depth_);
    } else if (depth_ > 0 && (c == ']' || c == '}')) {
      --depth_;
    }
  }
  // Neither in a string nor in brackets.
  bool outside() const { return !in_string_ && depth_ == 0; }
  bool too_deep() const { return deepest_ > kMaxRowNesting; }

 private:
  bool in_string_ = false;
  bool escaped_ = false;
  int depth_ = 0;
  int deepest_ = 0;
};

bool IsTooDeep(absl::string_view text) {
  BracketScan scan;
  for (size_t i = 0; i < text.size() && !scan.too_deep(); ++i) scan.Take(text[i]);
  return scan.too_deep();
}

// nlohmann's "… at line 1, column 9: syntax error while parsing value - unexpected end of input; expected …" -> "column 9: unexpected end of input".
std::string ParserComplaint(absl::string_view what, size_t byte) {
  const size_t dash = what.find(" - ");
  absl::string_view reason = dash == absl::string_view::npos ? what : what.substr(dash + 3);
  reason = reason.substr(0, reason.find("; "));
  if (FindInvalidUtf8(reason) != absl::string_view::npos) reason = "syntax error";
  return absl::StrCat("byte ", byte, ": ", reason.substr(0, 160));
}

absl::StatusOr<Json> ParseRow(const RowFormat& format, int64_t number, absl::string_view text) {
  if (static_cast<int64_t>(text.size()) > kMaxRowBytes) {
    return RowError(format.source, number, absl::StrCat("has ", text.size(), " bytes, more than the limit of ", kMaxRowBytes, ": split the document"));
  }
  if (const size_t bad = FindInvalidUtf8(text); bad != absl::string_view::npos) {
    return RowError(format.source, number, absl::StrCat("byte ", bad + 1, " is not valid UTF-8: save the file as UTF-8"));
  }
  if (IsTooDeep(text)) {
    return RowError(format.source, number, absl::StrCat("is nested deeper than ", kMaxRowNesting, " levels: a row is one flat object of strings"));
  }
  Json row;
  // The parser keeps the last of two values with one key; which one was meant, nobody knows.
  std::set<std::string> keys;
  std::string repeated;
  const auto note_key = [&](int depth, Json::parse_event_t event, Json& key) {
    if (event == Json::parse_event_t::key && depth == 1 && repeated.empty() && !keys.insert(key.get_ref<const std::string&>()).second)
      repeated = Quoted(key.get_ref<const std::string&>());
    return true;
  };
  try {
    row = Json::parse(text.begin(), text.end(), note_key);
  } catch (const Json::parse_error& error) {
    return RowError(format.source, number, absl::StrCat("is not valid JSON at ", ParserComplaint(error.what(), error.byte), ": write one JSON object per row"));
  } catch (const Json::exception&) {  // a number beyond double
    return RowError(format.source, number, "is not valid JSON: a number is out of range");
  }
  if (!row.is_object()) return RowError(format.source, number, absl::StrCat("is ", TypeName(row), ", expected one JSON object per row"));
  if (!repeated.empty()) return RowError(format.source, number, absl::StrCat("the key ", repeated, " is there twice: remove one of them"));
  return row;
}

absl::StatusOr<std::string> TakeField(const RowFormat& format, int64_t number, Json& row, const std::string& key) {
  const auto entry = row.find(key);
  if (entry == row.end()) return RowError(format.source, number, MissingField(row, key));
  if (!entry->is_string()) {
    return RowError(format.source, number, absl::StrCat("field ", key, ": expected a string, found ", TypeName(*entry), ": write the text as one string"));
  }
  return std::move(entry->get_ref<std::string&>());
}

}  // namespace

absl::Status RowError(absl::string_view source, int64_t row, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": row ", row, ": ", what));
}

absl::Status EmptyDatasetError(absl::string_view source) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": the dataset is empty: it needs at least one row, one JSON object per line"));
}

absl::StatusOr<RowFormat> MakeRowFormat(absl::string_view source, absl::string_view type, const std::map<std::string, std::string>& field_map) {
  const auto names = std::find_if(std::begin(kFormats), std::end(kFormats), [&](const FormatNames& f) { return type == f.type; });
  if (names == std::end(kFormats)) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": type ", Quoted(type), " is not supported yet: use summarization, prompt_completion or completion"));
  }
  RowFormat format{std::string(source), names->format, names->context_role, names->answer_role};
  for (const auto& [role, key] : field_map) {
    if (!role.empty() && role == names->context_role) {
      format.context_key = key;
    } else if (role == names->answer_role) {
      format.answer_key = key;
    } else {
      const std::string roles = *names->context_role ? absl::StrCat(names->context_role, " and ", names->answer_role) : std::string(names->answer_role);
      return absl::InvalidArgumentError(absl::StrCat(source, ": field_map has no role ", Quoted(role), ": the roles of ", type, " are ", roles));
    }
  }
  if (format.context_key == format.answer_key) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": field_map gives the key ", Quoted(format.answer_key), " to two roles: give each role its own key"));
  }
  return format;
}

RowReader::RowReader(absl::string_view bytes, RowFormat format) : format_(std::move(format)), rest_(bytes) {
  if (absl::StartsWith(rest_, "\xEF\xBB\xBF")) rest_.remove_prefix(3);
  const size_t first = rest_.find_first_not_of(kJsonSpace);
  is_array_ = first != absl::string_view::npos && rest_[first] == '[';
  if (is_array_) rest_.remove_prefix(first + 1);
}

absl::StatusOr<bool> RowReader::NextLine(absl::string_view* text) {
  while (!rest_.empty()) {
    const size_t end = std::min(rest_.find('\n'), rest_.size());
    *text = rest_.substr(0, end);
    rest_.remove_prefix(std::min(end + 1, rest_.size()));
    ++number_;
    if (!IsBlank(*text)) return true;
  }
  return false;
}

// Finds the end of the next element; ParseRow judges what is inside.
absl::StatusOr<bool> RowReader::NextElement(absl::string_view* text) {
  const auto skip_space = [this] { rest_.remove_prefix(std::min(rest_.find_first_not_of(kJsonSpace), rest_.size())); };
  const auto broken = [this](absl::string_view what) { return RowError(format_.source, number_, absl::StrCat("is not valid JSON: ", what)); };
  skip_space();
  if (array_ended_) {
    if (rest_.empty()) return false;
    return absl::InvalidArgumentError(absl::StrCat(format_.source, ": row ", number_, ": something follows the closing ] of the list"));
  }
  if (number_ == 0 && absl::StartsWith(rest_, "]")) {
    rest_.remove_prefix(1);
    array_ended_ = true;
    return NextElement(text);
  }
  ++number_;
  BracketScan scan;
  size_t i = 0;
  for (; i < rest_.size() && static_cast<int64_t>(i) <= kMaxRowBytes; ++i) {
    if (scan.outside() && (rest_[i] == ',' || rest_[i] == ']')) break;
    scan.Take(rest_[i]);
  }
  *text = rest_.substr(0, i);
  if (static_cast<int64_t>(i) > kMaxRowBytes || scan.too_deep()) return true;  // ParseRow refuses it
  if (i >= rest_.size()) return broken("the list is not closed with ]");
  if (IsBlank(*text)) return broken("an element is missing between commas");
  array_ended_ = rest_[i] == ']';
  rest_.remove_prefix(i + 1);
  return true;
}

absl::StatusOr<bool> RowReader::Next(Row* row) {
  absl::string_view text;
  PPFT_ASSIGN_OR_RETURN(const bool found, is_array_ ? NextElement(&text) : NextLine(&text));
  if (!found) return false;
  PPFT_ASSIGN_OR_RETURN(Json json, ParseRow(format_, number_, text));
  row->number = number_;
  row->context.clear();
  if (!format_.context_key.empty()) {
    PPFT_ASSIGN_OR_RETURN(row->context, TakeField(format_, number_, json, format_.context_key));
  }
  PPFT_ASSIGN_OR_RETURN(row->answer, TakeField(format_, number_, json, format_.answer_key));
  if (row->answer.empty()) {
    return RowError(format_.source, number_,
                    absl::StrCat("field ", format_.answer_key, " is empty: there is nothing to learn from; fill it or remove the row"));
  }
  return true;
}

absl::StatusOr<RowTotals> MeasureRows(absl::string_view source, absl::string_view bytes, absl::string_view type,
                                      const std::map<std::string, std::string>& field_map) {
  PPFT_ASSIGN_OR_RETURN(RowFormat format, MakeRowFormat(source, type, field_map));
  RowReader reader(bytes, std::move(format));
  Row row;
  RowTotals totals;
  while (true) {
    PPFT_ASSIGN_OR_RETURN(const bool found, reader.Next(&row));
    if (!found) break;
    ++totals.rows;
    totals.context_bytes += static_cast<int64_t>(row.context.size());
    totals.answer_bytes += static_cast<int64_t>(row.answer.size());
  }
  if (totals.rows == 0) return EmptyDatasetError(source);
  return totals;
}

}  // namespace ppft::data
