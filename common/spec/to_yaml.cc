#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/spec/schema.h"
#include "common/spec/spec.h"

namespace ppft::spec {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

// Words that every YAML version reads as a text stay bare; all else is quoted.
std::string Scalar(absl::string_view text) {
  static const auto* const kSpecial = new std::vector<std::string>{"null", "true", "false", "yes", "no", "on", "off", "y", "n"};
  const auto plain = [](char c) { return absl::ascii_isalnum(c) || c == '_' || c == '-' || c == '.' || c == '/'; };
  const std::string lower = absl::AsciiStrToLower(text);
  if (!text.empty() && absl::ascii_isalpha(text[0]) && std::all_of(text.begin(), text.end(), plain) &&
      std::find(kSpecial->begin(), kSpecial->end(), lower) == kSpecial->end()) {
    return std::string(text);
  }
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      absl::StrAppend(&out, "\\", std::string(1, c));
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      absl::StrAppendFormat(&out, "\\x%02x", static_cast<unsigned char>(c));
    } else {
      out += c;
    }
  }
  return out + "\"";
}

// The shortest decimal that reads back as the same number.
std::string Number(double value) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value);
  return std::string(buffer, end.ptr);
}

std::string Duration(const google::protobuf::Duration& duration) {
  if (duration.nanos() == 0) return absl::StrCat(duration.seconds(), "s");
  std::string fraction = absl::StrFormat("%09d", duration.nanos());
  while (fraction.back() == '0') fraction.pop_back();
  return absl::StrCat(duration.seconds(), ".", fraction, "s");
}

std::string Map(const Message& message, const FieldDescriptor* field) {
  std::map<std::string, std::string> sorted;
  for (int i = 0; i < message.GetReflection()->FieldSize(message, field); ++i) {
    const Message& pair = message.GetReflection()->GetRepeatedMessage(message, field, i);
    sorted[pair.GetReflection()->GetString(pair, field->message_type()->map_key())] = pair.GetReflection()->GetString(pair, field->message_type()->map_value());
  }
  std::vector<std::string> parts;
  for (const auto& [key, value] : sorted) parts.push_back(absl::StrCat(Scalar(key), ": ", Scalar(value)));
  return absl::StrCat("{", absl::StrJoin(parts, ", "), "}");
}

std::string List(const Message& message, const FieldDescriptor* field) {
  std::vector<std::string> parts;
  for (int i = 0; i < message.GetReflection()->FieldSize(message, field); ++i) {
    parts.push_back(field->cpp_type() == FieldDescriptor::CPPTYPE_STRING ? Scalar(message.GetReflection()->GetRepeatedString(message, field, i))
                                                                         : absl::StrCat(message.GetReflection()->GetRepeatedInt32(message, field, i)));
  }
  return absl::StrCat("[", absl::StrJoin(parts, ", "), "]");
}

// The value as job.yaml writes it; "" if the key is left out.
std::string Leaf(const Rule& rule, const Message& message, const FieldDescriptor* field) {
  const Reflection* reflection = message.GetReflection();
  if (field->has_presence() && !reflection->HasField(message, field)) return "";
  if (field->is_repeated() && reflection->FieldSize(message, field) == 0 && !*rule.fallback) return "";
  if (field->is_map()) return Map(message, field);
  if (field->is_repeated()) return List(message, field);
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64: {
      const int64_t value = field->cpp_type() == FieldDescriptor::CPPTYPE_INT32 ? reflection->GetInt32(message, field) : reflection->GetInt64(message, field);
      return value == 0 && *rule.zero_word ? rule.zero_word : absl::StrCat(value);
    }
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      const double value = reflection->GetDouble(message, field);
      if (value == 0 && *rule.zero_word) return rule.zero_word;
      return rule.kind == Kind::kInt && value == std::floor(value) ? absl::StrCat(static_cast<int64_t>(value)) : Number(value);
    }
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection->GetBool(message, field) ? "true" : "false";
    case FieldDescriptor::CPPTYPE_STRING: {
      const std::string value = reflection->GetString(message, field);
      return value.empty() && !*rule.fallback ? "" : Scalar(value);
    }
    default:
      return Duration(static_cast<const google::protobuf::Duration&>(reflection->GetMessage(message, field)));
  }
}

// Each line begins with `indent`, the first with `first` (the dash of a list's entry).
void Group(const Message& message, const std::string& prefix, std::string first, const std::string& indent, const std::map<std::string, std::string>& comments,
           std::string* out) {
  const auto line = [&](absl::string_view text) {
    absl::StrAppend(out, first, text, "\n");
    first = indent;
  };
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message.GetDescriptor()->field(i);
    const std::string path = Join(prefix, field->name());
    const Reflection* reflection = message.GetReflection();
    if (!IsGroup(field)) {
      // `source` differs from `path` only after an upload.
      if (field->name() == "source" &&
          reflection->GetString(message, field) == reflection->GetString(message, message.GetDescriptor()->FindFieldByName("path")))
        continue;
      const Rule* rule = FindRule(path);
      const std::string value = rule == nullptr ? "" : Leaf(*rule, message, field);
      const auto comment = comments.find(path);
      if (!value.empty()) line(absl::StrCat(field->name(), ": ", value, comment == comments.end() ? "" : absl::StrCat("  # ", comment->second)));
    } else if (!field->is_repeated()) {
      std::string inner;
      Group(reflection->GetMessage(message, field), path, indent + "  ", indent + "  ", comments, &inner);
      if (inner.empty()) continue;
      line(absl::StrCat(field->name(), ":"));
      absl::StrAppend(out, inner);
    } else if (reflection->FieldSize(message, field) > 0) {
      line(absl::StrCat(field->name(), ":"));
      for (int item = 0; item < reflection->FieldSize(message, field); ++item) {
        Group(reflection->GetRepeatedMessage(message, field, item), path + "[]", indent + "  - ", indent + "    ", comments, out);
      }
    }
  }
}

}  // namespace

std::string ToYaml(const v1::JobSpec& spec, const std::map<std::string, std::string>& comments) {
  std::string out;
  Group(spec, "", "", "", comments, &out);
  return out;
}

}  // namespace ppft::spec
