// A model folder's tokenizer: tokenizer.json by Hugging Face's own library with the ids of transformers.AutoTokenizer, or, where that file is
// missing, tokenizer.model by SentencePiece. Used by ppft-prepare alone: SentencePiece must not share a process with libprotobuf.
// Thread: Load once, then const methods from any thread. Errors: NOT_FOUND without a tokenizer file, INVALID_ARGUMENT with the file's name.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft::text {

// A token and the bytes [begin, end) of the text that it stands for. Tokens of one character share its range.
struct Token {
  uint32_t id = 0;
  uint32_t begin = 0;
  uint32_t end = 0;
  bool added = false;  // by the tokenizer itself (BOS, EOS): it stands for nothing in the text
};

class Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& folder);
  virtual ~Tokenizer() = default;

  // The whole text, which is UTF-8 and below 4 GiB, with the special tokens that the tokenizer adds.
  virtual absl::StatusOr<std::vector<Token>> Encode(absl::string_view text) const = 0;
  // As the vocabulary writes it; "" if there is no such id.
  virtual std::string Piece(uint32_t id) const = 0;
  virtual std::optional<uint32_t> IdOf(absl::string_view piece) const = 0;
  // The largest id + 1, added tokens included.
  virtual int64_t num_ids() const = 0;
  // The most bytes of text that one token can stand for; exceeded only by runs of unknown characters.
  virtual int64_t max_piece_bytes() const = 0;

  // The end-of-text token of tokenizer_config.json (or special_tokens_map.json, or the model file); nullopt if it is not in the vocabulary.
  std::optional<uint32_t> eos_id() const { return eos_id_; }
  const std::string& eos_piece() const { return eos_piece_; }  // as configured, also if it has no id

 protected:
  std::optional<uint32_t> eos_id_;
  std::string eos_piece_;
};

}  // namespace ppft::text
