#include "coordinator/prepare/row_tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/data/labels.h"

namespace ppft::coordinator::prepare {
namespace {

bool StartsCharacter(absl::string_view text, size_t at) { return at >= text.size() || (static_cast<unsigned char>(text[at]) & 0xC0) != 0x80; }

size_t CharacterAtOrBefore(absl::string_view text, size_t at) {
  while (at > 0 && !StartsCharacter(text, at)) --at;
  return at;
}

size_t CharacterAtOrAfter(absl::string_view text, size_t at) {
  while (!StartsCharacter(text, at)) ++at;
  return std::min(at, text.size());
}

// First bytes of the tokens that begin within [begin, end).
std::vector<size_t> TokensWithin(const std::vector<text::Token>& tokens, size_t begin, size_t end) {
  std::vector<size_t> starts;
  for (const text::Token& token : tokens) {
    if (!token.added && token.begin >= begin && token.begin < end) starts.push_back(token.begin);
  }
  return starts;
}

}  // namespace

RowTokenizer::RowTokenizer(const text::Tokenizer& tokenizer, const DataOptions& options)
    : tokenizer_(tokenizer),
      options_(options),
      max_bytes_(static_cast<size_t>(options.sequence_len) * static_cast<size_t>(tokenizer.max_piece_bytes())),
      eos_(tokenizer.eos_id().value_or(0)) {}

RowTokenizer::Rendered RowTokenizer::Render(const data::RowFormat& format, absl::string_view context, absl::string_view answer) const {
  const bool is_summary = format.format == data::Format::kSummarization;
  const absl::string_view before = is_summary ? absl::string_view(options_.instruction_prefix) : "";
  const absl::string_view between = is_summary ? absl::string_view(options_.response_prefix) : "";
  Rendered out;
  out.text = absl::StrCat(before, context, between, answer);
  out.context_begin = before.size();
  out.context_end = before.size() + context.size();
  out.boundary = out.text.size() - answer.size();
  return out;
}

absl::StatusOr<RowTokenizer::Encoded> RowTokenizer::Encode(Rendered rendered) const {
  Encoded out;
  PPFT_ASSIGN_OR_RETURN(out.tokens, tokenizer_.Encode(rendered.text));
  out.ends_in_eos = !out.tokens.empty() && out.tokens.back().id == eos_;
  out.rendered = std::move(rendered);
  return out;
}

// Looks at the beginning of a very long text first: that settles it, without memory in proportion to the row.
absl::StatusOr<bool> RowTokenizer::IsTooLong(const Rendered& rendered) const {
  if (rendered.text.size() <= max_bytes_) return false;
  Rendered beginning;
  beginning.text = rendered.text.substr(0, CharacterAtOrBefore(rendered.text, max_bytes_));
  PPFT_ASSIGN_OR_RETURN(const Encoded encoded, Encode(std::move(beginning)));
  return encoded.length() > options_.sequence_len;
}

absl::StatusOr<RowTokenizer::Encoded> RowTokenizer::Truncate(const data::RowFormat& format, const data::Row& row, bool* truncated) const {
  const bool keeps_end = format.format == data::Format::kPromptCompletion;
  const bool is_text = format.format == data::Format::kCompletion;
  absl::string_view context = row.context;
  absl::string_view answer = row.answer;
  if (is_text && answer.size() > max_bytes_) {
    answer = answer.substr(0, CharacterAtOrBefore(answer, max_bytes_));
    *truncated = true;
  }
  if (!is_text && answer.size() > max_bytes_) {
    return absl::InvalidArgumentError(absl::StrCat("field ", format.answer_key, ": its ", answer.size(), " bytes are more than sequence_len (",
                                                   options_.sequence_len, ") tokens can hold: shorten it, raise sequence_len or remove the row"));
  }
  if (context.size() > max_bytes_) {
    context =
        keeps_end ? context.substr(CharacterAtOrAfter(context, context.size() - max_bytes_)) : context.substr(0, CharacterAtOrBefore(context, max_bytes_));
    *truncated = true;
  }
  while (true) {
    PPFT_ASSIGN_OR_RETURN(Encoded encoded, Encode(Render(format, context, answer)));
    const int64_t excess = encoded.length() - options_.sequence_len;
    if (excess <= 0) return encoded;
    *truncated = true;
    if (is_text) return encoded;  // Label keeps the first tokens
    if (context.empty()) {
      const char* around = format.format == data::Format::kSummarization ? "with instruction_prefix and response_prefix it takes " : "alone it takes ";
      return absl::InvalidArgumentError(absl::StrCat("field ", format.answer_key, ": ", around, encoded.length(), " tokens, more than sequence_len (",
                                                     options_.sequence_len, "): shorten it, raise sequence_len or remove the row"));
    }
    // Cut so many tokens of the context; the rest is tokenised anew, which may come out a little longer, so look again.
    const Rendered& now = encoded.rendered;
    const std::vector<size_t> starts = TokensWithin(encoded.tokens, now.context_begin, now.context_end);
    if (static_cast<int64_t>(starts.size()) <= excess) {
      context = absl::string_view();
    } else if (keeps_end) {
      const size_t cut = std::max<size_t>(starts[excess] - now.context_begin, 1);
      context = context.substr(CharacterAtOrAfter(context, cut));
    } else {
      context = context.substr(0, CharacterAtOrBefore(context, starts[starts.size() - excess] - now.context_begin));
    }
  }
}

absl::StatusOr<TokenizedRow> RowTokenizer::Label(const data::RowFormat& format, const data::Row& row, Encoded encoded, bool truncated, bool keep_text) const {
  const bool is_text = format.format == data::Format::kCompletion;
  const data::LabelRule rule{encoded.rendered.boundary, is_text || options_.train_on_inputs};
  std::vector<text::Token>& tokens = encoded.tokens;
  if (encoded.length() > options_.sequence_len) {
    tokens.resize(static_cast<size_t>(options_.sequence_len));
  } else if (!encoded.ends_in_eos && !(is_text && truncated)) {
    const uint32_t end = static_cast<uint32_t>(encoded.rendered.text.size());
    tokens.push_back({eos_, end, end, true});
  }

  TokenizedRow out;
  out.number = row.number;
  out.truncated = truncated;
  for (size_t t = 0; t < tokens.size(); ++t) {
    const text::Token& token = tokens[t];
    bool supervised = data::IsSupervised(rule, token.begin, token.end, token.added);
    if (t + 1 == tokens.size() && token.id == eos_) supervised = options_.train_on_eos && (supervised || token.added);
    out.ids.push_back(token.id);
    out.supervised.push_back(supervised ? 1 : 0);
    if (t > 0 && supervised) ++out.targets;
  }
  if (out.targets == 0) {
    return absl::InvalidArgumentError(absl::StrCat("field ", format.answer_key, ": no token of the row is supervised: lengthen it or remove the row"));
  }
  if (keep_text) {
    out.text = std::move(encoded.rendered.text);
    out.tokens = std::move(tokens);
  }
  return out;
}

absl::StatusOr<TokenizedRow> RowTokenizer::Tokenize(const data::RowFormat& format, const data::Row& row, bool keep_text) const {
  const auto in_row = [&](const absl::Status& status) {
    return absl::IsInvalidArgument(status) ? data::RowError(format.source, row.number, status.message()) : status;
  };
  bool truncated = false;
  if (options_.excess_length_strategy == "truncate") {
    absl::StatusOr<Encoded> encoded = Truncate(format, row, &truncated);
    if (!encoded.ok()) return in_row(encoded.status());
    absl::StatusOr<TokenizedRow> labelled = Label(format, row, *std::move(encoded), truncated, keep_text);
    return labelled.ok() ? std::move(labelled) : in_row(labelled.status());
  }

  Rendered rendered = Render(format, row.context, row.answer);
  absl::StatusOr<bool> too_long = IsTooLong(rendered);
  if (!too_long.ok()) return in_row(too_long.status());
  absl::StatusOr<Encoded> encoded = Encoded();
  if (!*too_long) {
    encoded = Encode(std::move(rendered));
    if (!encoded.ok()) return in_row(encoded.status());
    too_long = encoded->length() > options_.sequence_len;
  }
  if (*too_long && options_.excess_length_strategy == "raise") {
    const std::string length = encoded->tokens.empty() ? "" : absl::StrCat(" (", encoded->length(), ")");
    return data::RowError(
        format.source, row.number,
        absl::StrCat("field ", format.context_key.empty() ? format.answer_key : format.context_key, ": the row has more tokens", length, " than sequence_len (",
                     options_.sequence_len, "): raise sequence_len, or set excess_length_strategy to truncate or drop"));
  }
  if (*too_long) {
    TokenizedRow dropped;
    dropped.number = row.number;
    dropped.dropped = true;
    return dropped;
  }
  absl::StatusOr<TokenizedRow> labelled = Label(format, row, *std::move(encoded), /*truncated=*/false, keep_text);
  return labelled.ok() ? std::move(labelled) : in_row(labelled.status());
}

}  // namespace ppft::coordinator::prepare
