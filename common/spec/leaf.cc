#include "common/spec/leaf.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"

namespace ppft::spec {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

// [-+] digits, without leading zeros: what every YAML version reads as the same whole number.
bool LooksWhole(absl::string_view text) {
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
  if (text.empty() || (text.size() > 1 && text[0] == '0')) return false;
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

bool LooksDecimal(absl::string_view text) {
  size_t digits = 0, i = 0;
  if (i < text.size() && (text[i] == '-' || text[i] == '+')) ++i;
  const auto run = [&] {
    for (; i < text.size() && text[i] >= '0' && text[i] <= '9'; ++i) ++digits;
  };
  run();
  if (i < text.size() && text[i] == '.') {
    ++i;
    run();
  }
  if (digits == 0) return false;
  if (i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
    ++i;
    if (i < text.size() && (text[i] == '-' || text[i] == '+')) ++i;
    digits = 0;
    run();
    if (digits == 0) return false;
  }
  return i == text.size();
}

struct LeafReader : Leaf {
  void WrongType() {
    const bool unquote = node.kind == Node::Kind::kScalar && node.quoted && (LooksDecimal(node.text) || node.text == "true" || node.text == "false");
    notes->Add(key, path, absl::StrCat("is ", Shown(node), ", but must be ", Describe(rule), unquote ? " (remove the quotes)" : ""));
  }

  void Read() {
    const Reflection* reflection = message->GetReflection();
    const auto bad = [&] { WrongType(); };
    switch (rule.kind) {
      case Kind::kText:
      case Kind::kName:
      case Kind::kWord:
        if (node.kind != Node::Kind::kScalar) return bad();
        return reflection->SetString(message, field, node.text);
      case Kind::kWords:
        return Words();
      case Kind::kInt:
        return Int();
      case Kind::kInts:
        return Ints();
      case Kind::kNumber:
        return Number();
      case Kind::kBool:
        if (node.kind != Node::Kind::kScalar || node.quoted || (node.text != "true" && node.text != "false")) return bad();
        return reflection->SetBool(message, field, node.text == "true");
      case Kind::kDuration:
        return Duration();
      case Kind::kTextMap:
        return TextMap();
      case Kind::kFixed:
        return;
    }
  }

  void Words() {
    const Reflection* reflection = message->GetReflection();
    const std::vector<std::string> words = WordsOf(rule);
    const bool targets = absl::EndsWith(rule.path, "target_modules");
    std::vector<std::string> chosen;
    if (targets && IsWord(node, "all-linear")) {
      chosen = words;
    } else if (node.kind == Node::Kind::kScalar) {
      chosen = {node.text};
    } else if (node.kind == Node::Kind::kList) {
      for (size_t i = 0; i < node.items.size(); ++i) {
        const Node& item = node.items[i];
        const std::string place = absl::StrCat(path, "[", i, "]");
        notes->Note(place, item.mark);
        if (item.kind != Node::Kind::kScalar) return WrongType();
        if (targets && item.text == "all-linear") {
          notes->Wrong(path);
          return notes->Add(item.mark, place, "all-linear stands alone: write target_modules: all-linear");
        }
        chosen.push_back(item.text);
      }
    } else {
      return WrongType();
    }
    // Known words in the table's order; what is not known keeps its place for the error.
    const auto rank = [&](const std::string& word) { return std::find(words.begin(), words.end(), word) - words.begin(); };
    if (std::all_of(chosen.begin(), chosen.end(), [&](const std::string& word) { return rank(word) < static_cast<long>(words.size()); })) {
      std::stable_sort(chosen.begin(), chosen.end(), [&](const std::string& a, const std::string& b) { return rank(a) < rank(b); });
    }
    reflection->ClearField(message, field);
    for (const std::string& word : chosen) reflection->AddString(message, field, word);
  }

  // NaN if it is not a whole number; values beyond 64 bits become infinite. `or_decimal`: 16.0 is whole, too.
  static double WholeValue(const Node& node, bool or_decimal) {
    if (node.kind != Node::Kind::kScalar || node.quoted || !(LooksWhole(node.text) || (or_decimal && LooksDecimal(node.text)))) return std::nan("");
    double value;
    return absl::SimpleAtod(node.text, &value) && value == std::floor(value) ? value : std::nan("");
  }

  void Int() {
    const Reflection* reflection = message->GetReflection();
    const bool by_word = *rule.zero_word && IsWord(node, rule.zero_word);
    const double value = by_word ? 0 : WholeValue(node, field->cpp_type() == FieldDescriptor::CPPTYPE_DOUBLE);
    if (std::isnan(value)) return WrongType();
    if (!by_word && (value < rule.low || value > rule.high)) return notes->Add(key, path, absl::StrCat(node.text, " is out of range: use ", Describe(rule)));
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        return reflection->SetInt32(message, field, static_cast<int32_t>(value));
      case FieldDescriptor::CPPTYPE_INT64:
        return reflection->SetInt64(message, field, static_cast<int64_t>(value));
      default:
        return reflection->SetDouble(message, field, value);
    }
  }

  void Ints() {
    if (node.kind != Node::Kind::kList) return WrongType();
    for (size_t i = 0; i < node.items.size(); ++i) {
      const double value = WholeValue(node.items[i], false);
      const std::string place = absl::StrCat(path, "[", i, "]");
      notes->Note(place, node.items[i].mark);
      if (!(value >= rule.low && value <= rule.high)) {
        notes->Wrong(path);
        return notes->Add(node.items[i].mark, place, absl::StrCat("is ", Shown(node.items[i]), ", but must be ", Describe(rule)));
      }
      message->GetReflection()->AddInt32(message, field, static_cast<int32_t>(value));
    }
  }

  void Number() {
    if (*rule.zero_word && IsWord(node, rule.zero_word)) return message->GetReflection()->SetDouble(message, field, 0);
    if (node.kind != Node::Kind::kScalar || node.quoted) return WrongType();
    const std::string lower = absl::AsciiStrToLower(node.text);
    const absl::string_view unsigned_text = absl::StripPrefix(absl::StripPrefix(lower, "-"), "+");
    double value;
    if (unsigned_text == ".inf" || unsigned_text == "inf" || unsigned_text == "infinity" || unsigned_text == ".nan" || unsigned_text == "nan") {
      return notes->Add(key, path, absl::StrCat(node.text, " is not a finite number: use ", Describe(rule)));
    }
    if (!LooksDecimal(node.text) || !absl::SimpleAtod(node.text, &value)) return WrongType();
    if (*rule.zero_word && value == 0) return notes->Add(key, path, absl::StrCat(node.text, " is out of range: use ", Describe(rule)));
    message->GetReflection()->SetDouble(message, field, value);
  }

  void Duration() {
    absl::Duration duration;
    if (node.kind != Node::Kind::kScalar || !absl::ParseDuration(node.text, &duration) || duration == absl::InfiniteDuration() ||
        duration == -absl::InfiniteDuration() || (duration == absl::ZeroDuration() && node.text == "0")) {
      return WrongType();
    }
    const int64_t seconds = absl::ToInt64Seconds(duration);
    if (duration < absl::Seconds(rule.low) || duration > absl::Seconds(rule.high)) {
      return notes->Add(key, path, absl::StrCat(node.text, " is out of range: use ", Describe(rule)));
    }
    auto* out = static_cast<google::protobuf::Duration*>(message->GetReflection()->MutableMessage(message, field));
    out->set_seconds(seconds);
    out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration - absl::Seconds(seconds))));
  }

  void TextMap() {
    if (node.kind != Node::Kind::kMap) return WrongType();
    const Reflection* reflection = message->GetReflection();
    const FieldDescriptor* key_field = field->message_type()->map_key();
    const FieldDescriptor* value_field = field->message_type()->map_value();
    std::set<std::string> seen;
    for (const Entry& entry : node.entries) {
      const std::string place = Join(path, entry.key);
      notes->Note(place, entry.mark);
      if (!seen.insert(entry.key).second) {
        notes->Add(entry.mark, place, "is given twice: remove one");
        continue;
      }
      if (entry.value.kind != Node::Kind::kScalar) {
        notes->Add(entry.mark, place, absl::StrCat("is ", Shown(entry.value), ", but must be a text"));
        continue;
      }
      Message* pair = reflection->AddMessage(message, field);
      pair->GetReflection()->SetString(pair, key_field, entry.key);
      pair->GetReflection()->SetString(pair, value_field, entry.value.text);
    }
  }
};

}  // namespace

void ReadLeaf(const Leaf& leaf) { LeafReader{leaf}.Read(); }

std::string Shown(const Node& node) {
  if (node.kind != Node::Kind::kScalar) return absl::StrCat("a ", KindName(node));
  const absl::string_view text = node.text;
  return absl::StrCat("\"", text.substr(0, 60), text.size() > 60 ? "…" : "", "\"");
}

bool IsWord(const Node& node, absl::string_view word) { return node.kind == Node::Kind::kScalar && node.text == word; }

}  // namespace ppft::spec
