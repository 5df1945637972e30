#include "common/text/tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "common/text/sentencepiece_model.h"

extern "C" {
struct PpftTokenizer;
struct PpftEncoding {
  size_t len;
  uint32_t* ids;
  uint32_t* begin;
  uint32_t* end;
  uint8_t* added;
};
PpftTokenizer* ppft_tokenizer_load(const char* json, size_t json_len, const char* config, size_t config_len, char** error);
void ppft_tokenizer_free(PpftTokenizer* tokenizer);
int ppft_tokenizer_encode(const PpftTokenizer* tokenizer, const char* text, size_t len, PpftEncoding* out, char** error);
void ppft_encoding_free(PpftEncoding* encoding);
uint64_t ppft_tokenizer_num_ids(const PpftTokenizer* tokenizer);
uint64_t ppft_tokenizer_max_piece_bytes(const PpftTokenizer* tokenizer);
int64_t ppft_tokenizer_token_to_id(const PpftTokenizer* tokenizer, const char* token, size_t len);
char* ppft_tokenizer_id_to_token(const PpftTokenizer* tokenizer, uint32_t id);
void ppft_text_free(char* text);
}

namespace ppft::text {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxTokenizerBytes = int64_t{256} << 20;
constexpr int64_t kMaxConfigBytes = int64_t{16} << 20;

// Takes over a text of the Rust library; "" for null.
std::string TakeText(char* text) {
  std::string out = text == nullptr ? "" : text;
  ppft_text_free(text);
  return out;
}

class HuggingFaceTokenizer : public Tokenizer {
 public:
  explicit HuggingFaceTokenizer(PpftTokenizer* tokenizer) : tokenizer_(tokenizer, ppft_tokenizer_free) {}

  absl::StatusOr<std::vector<Token>> Encode(absl::string_view text) const override {
    PpftEncoding encoding{};
    char* error = nullptr;
    if (ppft_tokenizer_encode(tokenizer_.get(), text.data(), text.size(), &encoding, &error) != 1) {
      return absl::InvalidArgumentError(absl::StrCat("the tokenizer failed: ", TakeText(error)));
    }
    std::vector<Token> tokens(encoding.len);
    for (size_t i = 0; i < encoding.len; ++i) tokens[i] = {encoding.ids[i], encoding.begin[i], encoding.end[i], encoding.added[i] != 0};
    ppft_encoding_free(&encoding);
    return tokens;
  }
  std::string Piece(uint32_t id) const override { return TakeText(ppft_tokenizer_id_to_token(tokenizer_.get(), id)); }
  std::optional<uint32_t> IdOf(absl::string_view piece) const override {
    const int64_t id = ppft_tokenizer_token_to_id(tokenizer_.get(), piece.data(), piece.size());
    return id < 0 ? std::optional<uint32_t>() : static_cast<uint32_t>(id);
  }
  int64_t num_ids() const override { return static_cast<int64_t>(ppft_tokenizer_num_ids(tokenizer_.get())); }
  int64_t max_piece_bytes() const override { return static_cast<int64_t>(ppft_tokenizer_max_piece_bytes(tokenizer_.get())); }

  void SetEos(const std::string& piece) {
    eos_piece_ = piece;
    eos_id_ = IdOf(piece);
  }

 private:
  std::unique_ptr<PpftTokenizer, void (*)(PpftTokenizer*)> tokenizer_;
};

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(std::unique_ptr<SentencePieceModel> model, bool add_bos, bool add_eos)
      : model_(std::move(model)), add_bos_(add_bos && model_->bos_id() >= 0), add_eos_(add_eos && model_->eos_id() >= 0) {
    for (int id = 0; id < model_->num_ids(); ++id) max_piece_bytes_ = std::max<int64_t>(max_piece_bytes_, static_cast<int64_t>(model_->PieceOf(id).size()));
  }

  absl::StatusOr<std::vector<Token>> Encode(absl::string_view text) const override {
    std::vector<SentencePieceModel::Piece> pieces;
    std::string error;
    if (!model_->Encode(std::string_view(text.data(), text.size()), &pieces, &error)) {
      return absl::InvalidArgumentError(absl::StrCat("the tokenizer failed: ", error));
    }
    std::vector<Token> tokens;
    tokens.reserve(pieces.size() + 2);
    if (add_bos_) tokens.push_back({static_cast<uint32_t>(model_->bos_id()), 0, 0, true});
    for (const auto& piece : pieces) tokens.push_back({piece.id, piece.begin, piece.end, false});
    if (add_eos_) tokens.push_back({static_cast<uint32_t>(model_->eos_id()), 0, 0, true});
    return tokens;
  }
  std::string Piece(uint32_t id) const override { return model_->PieceOf(static_cast<int>(id)); }
  std::optional<uint32_t> IdOf(absl::string_view piece) const override {
    const int id = model_->IdOf(std::string_view(piece.data(), piece.size()));
    return id < 0 ? std::optional<uint32_t>() : static_cast<uint32_t>(id);
  }
  int64_t num_ids() const override { return model_->num_ids(); }
  int64_t max_piece_bytes() const override { return max_piece_bytes_; }

  void SetEos(const std::string& piece) {
    if (!piece.empty()) {
      eos_piece_ = piece;
      eos_id_ = IdOf(piece);
    } else if (model_->eos_id() >= 0) {
      eos_piece_ = model_->PieceOf(model_->eos_id());
      eos_id_ = static_cast<uint32_t>(model_->eos_id());
    }
  }

 private:
  std::unique_ptr<SentencePieceModel> model_;
  bool add_bos_;
  bool add_eos_;
  int64_t max_piece_bytes_ = 1;
};

// An absent file is an empty object.
absl::StatusOr<Json> ReadConfig(const std::string& path, std::string* text) {
  text->clear();
  if (!PathExists(path)) return Json::object();
  PPFT_ASSIGN_OR_RETURN(*text, ReadFile(path, kMaxConfigBytes));
  Json config = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  return config;
}

// "eos_token": "</s>" or {"content": "</s>", …}; "" if it is not there.
std::string TokenIn(const Json& config, const char* name) {
  const auto entry = config.find(name);
  if (entry == config.end()) return "";
  if (entry->is_string()) return entry->get<std::string>();
  if (!entry->is_object()) return "";
  const auto content = entry->find("content");
  return content != entry->end() && content->is_string() ? content->get<std::string>() : "";
}

bool FlagIn(const Json& config, const char* name, bool fallback) {
  const auto entry = config.find(name);
  return entry != config.end() && entry->is_boolean() ? entry->get<bool>() : fallback;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& folder) {
  std::string config_text;
  std::string unused;
  PPFT_ASSIGN_OR_RETURN(const Json config, ReadConfig(JoinPath(folder, "tokenizer_config.json"), &config_text));
  PPFT_ASSIGN_OR_RETURN(const Json special, ReadConfig(JoinPath(folder, "special_tokens_map.json"), &unused));
  std::string eos = TokenIn(config, "eos_token");
  if (eos.empty()) eos = TokenIn(special, "eos_token");

  const std::string json_path = JoinPath(folder, "tokenizer.json");
  if (PathExists(json_path)) {
    PPFT_ASSIGN_OR_RETURN(const std::string json, ReadFile(json_path, kMaxTokenizerBytes));
    char* error = nullptr;
    PpftTokenizer* loaded = ppft_tokenizer_load(json.data(), json.size(), config_text.data(), config_text.size(), &error);
    if (loaded == nullptr) return absl::InvalidArgumentError(absl::StrCat(json_path, ": does not load: ", TakeText(error)));
    auto tokenizer = std::make_unique<HuggingFaceTokenizer>(loaded);
    tokenizer->SetEos(eos);
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
  }

  const std::string model_path = JoinPath(folder, "tokenizer.model");
  if (!PathExists(model_path)) {
    return absl::NotFoundError(absl::StrCat(folder, ": has neither tokenizer.json nor tokenizer.model: copy the base model's tokenizer into the folder"));
  }
  PPFT_ASSIGN_OR_RETURN(const std::string serialized, ReadFile(model_path, kMaxTokenizerBytes));
  std::string error;
  std::unique_ptr<SentencePieceModel> model = SentencePieceModel::Load(std::string_view(serialized.data(), serialized.size()), &error);
  if (model == nullptr) return absl::InvalidArgumentError(absl::StrCat(model_path, ": does not load: ", error));
  auto tokenizer = std::make_unique<SentencePieceTokenizer>(std::move(model), FlagIn(config, "add_bos_token", true), FlagIn(config, "add_eos_token", false));
  tokenizer->SetEos(eos);
  return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace ppft::text
