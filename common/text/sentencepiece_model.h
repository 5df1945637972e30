// tokenizer.model by the SentencePiece library, without its header: that one declares names in namespace absl and so must never meet Abseil's.
// Const methods from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ppft::text {

class SentencePieceModel {
 public:
  struct Piece {
    uint32_t id;
    uint32_t begin;  // bytes in the text
    uint32_t end;
  };

  // Null on error, with the reason in *error.
  static std::unique_ptr<SentencePieceModel> Load(std::string_view serialized, std::string* error);
  virtual ~SentencePieceModel() = default;

  // False on error.
  virtual bool Encode(std::string_view text, std::vector<Piece>* pieces, std::string* error) const = 0;
  virtual int num_ids() const = 0;
  virtual std::string PieceOf(int id) const = 0;
  virtual int IdOf(std::string_view piece) const = 0;  // -1 if it is not a piece
  virtual int bos_id() const = 0;                      // -1 if there is none
  virtual int eos_id() const = 0;
};

}  // namespace ppft::text
