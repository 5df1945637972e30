#include "common/text/sentencepiece_model.h"

#include <sentencepiece_processor.h>

namespace ppft::text {
namespace {

class ProcessorModel : public SentencePieceModel {
 public:
  sentencepiece::SentencePieceProcessor processor;

  bool Encode(std::string_view text, std::vector<Piece>* pieces, std::string* error) const override {
    const sentencepiece::ImmutableSentencePieceText encoded = processor.EncodeAsImmutableProto(text);
    const size_t count = encoded.pieces_size();
    if (count == 0 && !text.empty() && !processor.status().ok()) {
      *error = processor.status().ToString();
      return false;
    }
    pieces->reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const auto piece = encoded.pieces(static_cast<int>(i));
      pieces->push_back({piece.id(), piece.begin(), piece.end()});
    }
    return true;
  }
  int num_ids() const override { return processor.GetPieceSize(); }
  std::string PieceOf(int id) const override { return id >= 0 && id < processor.GetPieceSize() ? processor.IdToPiece(id) : std::string(); }
  int IdOf(std::string_view piece) const override {
    const int id = processor.PieceToId(piece);  // the unknown piece's id for what it does not know
    return processor.IdToPiece(id) == piece ? id : -1;
  }
  int bos_id() const override { return processor.bos_id(); }
  int eos_id() const override { return processor.eos_id(); }
};

}  // namespace

std::unique_ptr<SentencePieceModel> SentencePieceModel::Load(std::string_view serialized, std::string* error) {
  auto model = std::make_unique<ProcessorModel>();
  const sentencepiece::util::Status status = model->processor.LoadFromSerializedProto(serialized);
  if (!status.ok()) {
    *error = status.ToString();
    return nullptr;
  }
  if (model->processor.GetPieceSize() < 1) {
    *error = "the vocabulary is empty";
    return nullptr;
  }
  return model;
}

}  // namespace ppft::text
