#include "common/model/json.h"

#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::model {
namespace {

using nlohmann::json;

// First pass: checks what the DOM parser does not. Returning false stops the parser.
class Checker : public nlohmann::json_sax<json> {
 public:
  explicit Checker(int max_depth) : max_depth_(max_depth) {}
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override {
    keys_.emplace_back();
    return Deeper();
  }
  bool key(string_t& key) override {
    if (keys_.back().insert(key).second) return true;
    error_ = absl::StrCat("the key \"", key.substr(0, 200), "\" stands there twice");
    return false;
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool start_array(std::size_t) override { return Deeper(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: …": the library's tag helps nobody.
    const std::string what = e.what();
    const size_t tag = what.find("] ");
    error_ = absl::StrCat("not valid JSON near byte ", position, ": ", tag == std::string::npos ? what : what.substr(tag + 2).substr(0, 200));
    return false;
  }
  const std::string& error() const { return error_; }

 private:
  bool Deeper() {
    if (++depth_ <= max_depth_) return true;
    error_ = absl::StrCat("nested deeper than ", max_depth_, " levels");
    return false;
  }

  const int max_depth_;
  int depth_ = 0;
  std::vector<std::unordered_set<std::string>> keys_;  // of the open objects
  std::string error_;
};

}  // namespace

absl::StatusOr<json> ParseStrictJson(absl::string_view text, absl::string_view source, int max_depth) {
  Checker checker(max_depth);
  if (!json::sax_parse(text.begin(), text.end(), &checker)) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": ", checker.error().empty() ? "not valid JSON" : checker.error()));
  }
  json value = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(source, ": not valid JSON"));
  return value;
}

absl::StatusOr<json> ParseStrictObject(absl::string_view text, absl::string_view source, int max_depth) {
  PPFT_ASSIGN_OR_RETURN(json value, ParseStrictJson(text, source, max_depth));
  if (!value.is_object()) return absl::InvalidArgumentError(absl::StrCat(source, ": expected a JSON object, found ", value.type_name()));
  return value;
}

std::string ShortJson(const json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > 60) text = absl::StrCat(text.substr(0, 57), "...");
  return text;
}

}  // namespace ppft::model
