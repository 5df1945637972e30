#include <algorithm>
#include <charconv>
#include <cmath>
#include <tuple>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "common/spec/check.h"
#include "common/spec/schema.h"
#include "common/spec/spec.h"
#include "common/spec/suggest.h"
#include "common/spec/support.h"
#include "common/spec/yaml_tree.h"

namespace ppft::spec {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

std::string Shown(const Node& node) {
  if (node.kind != Node::Kind::kScalar) return absl::StrCat("a ", KindName(node));
  const absl::string_view text = node.text;
  return absl::StrCat("\"", text.substr(0, 60), text.size() > 60 ? "…" : "", "\"");
}

bool IsWord(const Node& node, absl::string_view word) { return node.kind == Node::Kind::kScalar && node.text == word; }

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

// Fills a JobSpec from the tree. Values that cannot be read leave the default and an error; ranges and words are checked afterwards.
class Reader {
 public:
  Reader(v1::JobSpec* spec, ParseResult* result, const std::vector<std::string>& sources) : spec_(spec), result_(result), sources_(sources) {}

  void Read(const Node& root) {
    if (root.kind == Node::Kind::kNull) return;
    if (root.kind != Node::Kind::kMap)
      return Add(root.mark, "", absl::StrCat("the file holds a ", KindName(root), ", not keys with values such as model: {base_model: NAME}"));
    Group(root, spec_, "");
  }

  void Add(const Mark& mark, const std::string& field, const std::string& message) {
    result_->errors.push_back({sources_[mark.source], mark.line, mark.column, field, message});
    wrong_.insert(field);
  }

  const std::set<std::string>& wrong() const { return wrong_; }

  void Note(const std::string& path, const Mark& mark) { result_->positions[path] = {sources_[mark.source], mark.line, mark.column}; }

  // Defaults of all leaves that do not depend on others.
  void Defaults(Message* message, const std::string& prefix) {
    for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
      const FieldDescriptor* field = message->GetDescriptor()->field(i);
      const std::string path = Join(prefix, field->name());
      if (IsGroup(field)) {
        if (!field->is_repeated()) Defaults(message->GetReflection()->MutableMessage(message, field), path);
        continue;
      }
      const Rule* rule = FindRule(PatternOf(path));
      if (rule == nullptr || !*rule->fallback) continue;
      std::vector<TreeError> none;
      Leaf(*rule, ReadTree(rule->fallback, 0, &none), Mark{}, message, field, path);
    }
  }

 private:
  void Group(const Node& node, Message* message, const std::string& prefix) {
    std::map<std::string, const Entry*> seen;
    for (const Entry& entry : node.entries) {
      const std::string name(ResolveAlias(prefix, entry.key));
      const std::string path = Join(prefix, name);
      const auto [first, added] = seen.emplace(name, &entry);
      if (!added) {
        const std::string before = first->second->mark.line > 0 ? absl::StrCat(" (first in line ", first->second->mark.line, ")") : "";
        const std::string other = first->second->key == entry.key ? "" : absl::StrCat(", there as ", first->second->key);
        Add(entry.mark, Join(prefix, entry.key), absl::StrCat("is given twice", before, other, ": remove one"));
        continue;
      }
      Note(path, entry.mark);
      Member(entry, name, path, message, prefix);
    }
  }

  void Member(const Entry& entry, const std::string& name, const std::string& path, Message* message, const std::string& prefix) {
    const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(name);
    const Rule* rule = FindRule(PatternOf(path));
    if (rule != nullptr && rule->kind == Kind::kFixed) return Fixed(*rule, entry, path);
    if (field == nullptr || (rule == nullptr && !IsGroup(field))) return Unknown(entry, prefix, message->GetDescriptor());
    if (entry.value.kind == Node::Kind::kNull) return;
    if (rule != nullptr) {
      if (rule->auto_is_default && IsWord(entry.value, "auto")) return;
      result_->given.insert(path);
      return Leaf(*rule, entry.value, entry.mark, message, field, path);
    }
    result_->given.insert(path);
    if (field->is_repeated()) return Groups(entry, message, field, path);
    if (entry.value.kind != Node::Kind::kMap)
      return Add(entry.mark, path, absl::StrCat("is ", Shown(entry.value), ", but must be a group of keys: ", KeysOf(field->message_type())));
    Group(entry.value, message->GetReflection()->MutableMessage(message, field), path);
  }

  void Groups(const Entry& entry, Message* message, const FieldDescriptor* field, const std::string& path) {
    if (entry.value.kind != Node::Kind::kList) {
      return Add(entry.mark, path,
                 absl::StrCat("is ", Shown(entry.value), ", but must be a list: begin each entry with \"- \" and give it ", KeysOf(field->message_type())));
    }
    for (size_t i = 0; i < entry.value.items.size(); ++i) {
      const Node& item = entry.value.items[i];
      const std::string place = absl::StrCat(path, "[", i, "]");
      Note(place, item.mark);
      Message* element = message->GetReflection()->AddMessage(message, field);
      if (item.kind == Node::Kind::kMap) {
        Group(item, element, place);
      } else {
        Add(item.mark, place, absl::StrCat("is ", Shown(item), ", but must be a group of keys: ", KeysOf(field->message_type())));
        for (const char* key : {".path", ".type"}) wrong_.insert(place + key);
      }
    }
  }

  static std::string KeysOf(const Descriptor* descriptor) {
    std::vector<std::string> names;
    for (int i = 0; i < descriptor->field_count(); ++i) names.push_back(descriptor->field(i)->name());
    return absl::StrJoin(names, ", ");
  }

  void Fixed(const Rule& rule, const Entry& entry, const std::string& path) {
    const Node& node = entry.value;
    if (node.kind == Node::Kind::kNull) return;
    const std::vector<Node> items = node.kind == Node::Kind::kList ? node.items : std::vector<Node>{node};
    for (const Node& item : items) {
      const std::string refusal = item.kind == Node::Kind::kScalar ? NotSupportedYet(rule.path, item.text) : absl::StrCat("must be ", rule.fallback);
      if (!refusal.empty()) return Add(entry.mark, path, refusal);
    }
    if (items.empty()) Add(entry.mark, path, absl::StrCat("is empty: leave it out or use ", rule.fallback));
  }

  void Unknown(const Entry& entry, const std::string& prefix, const Descriptor* descriptor) {
    std::vector<std::string> names;
    for (int i = 0; i < descriptor->field_count(); ++i) names.push_back(descriptor->field(i)->name());
    const std::string path = Join(prefix, entry.key.substr(0, 100));
    std::string message = "is not a known key";
    std::string meant = Nearest(entry.key, names);
    if (!meant.empty()) {
      wrong_.insert(Join(prefix, meant));
      meant = absl::StrCat("; did you mean ", meant, "?");
    } else if (const std::string elsewhere = Elsewhere(entry.key); !elsewhere.empty()) {
      wrong_.insert(elsewhere);
      meant = absl::StrCat("; did you mean ", elsewhere, "?");
    } else {
      meant = absl::StrCat(prefix.empty() ? "; the keys here are " : absl::StrCat("; the keys of ", prefix, " are "), absl::StrJoin(names, ", "));
    }
    Add(entry.mark, path, message + meant);
  }

  // The same or nearly the same key in another group, or the word of another trainer.
  static std::string Elsewhere(const std::string& key) {
    std::vector<std::string> leaves;
    for (const Rule& rule : Schema()) {
      const std::string path = rule.path;
      const std::string leaf = path.substr(path.rfind('.') + 1);
      if (leaf == key) return path;
      leaves.push_back(leaf);
    }
    if (const std::string known = KnownElsewhere(key); !known.empty()) return known;
    const std::string nearest = Nearest(key, leaves);
    return nearest.empty() ? "" : Schema()[std::find(leaves.begin(), leaves.end(), nearest) - leaves.begin()].path;
  }

  void WrongType(const Rule& rule, const Node& node, const Mark& key, const std::string& path) {
    const bool unquote = node.kind == Node::Kind::kScalar && node.quoted && (LooksDecimal(node.text) || node.text == "true" || node.text == "false");
    Add(key, path, absl::StrCat("is ", Shown(node), ", but must be ", Describe(rule), unquote ? " (remove the quotes)" : ""));
  }

  void Leaf(const Rule& rule, const Node& node, const Mark& key, Message* message, const FieldDescriptor* field, const std::string& path) {
    const Reflection* reflection = message->GetReflection();
    const auto bad = [&] { WrongType(rule, node, key, path); };
    switch (rule.kind) {
      case Kind::kText:
      case Kind::kName:
      case Kind::kWord:
        if (node.kind != Node::Kind::kScalar) return bad();
        return reflection->SetString(message, field, node.text);
      case Kind::kWords:
        return Words(rule, node, key, message, field, path);
      case Kind::kInt:
        return Int(rule, node, key, message, field, path);
      case Kind::kInts:
        return Ints(rule, node, key, message, field, path);
      case Kind::kNumber:
        return Number(rule, node, key, message, field, path);
      case Kind::kBool:
        if (node.kind != Node::Kind::kScalar || node.quoted || (node.text != "true" && node.text != "false")) return bad();
        return reflection->SetBool(message, field, node.text == "true");
      case Kind::kDuration:
        return Duration(rule, node, key, message, field, path);
      case Kind::kTextMap:
        return TextMap(rule, node, key, message, field, path);
      case Kind::kFixed:
        return;
    }
  }

  void Words(const Rule& rule, const Node& node, const Mark& key, Message* message, const FieldDescriptor* field, const std::string& path) {
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
        Note(place, item.mark);
        if (item.kind != Node::Kind::kScalar) return WrongType(rule, node, key, path);
        if (targets && item.text == "all-linear") return Add(item.mark, place, "all-linear stands alone: write target_modules: all-linear");
        chosen.push_back(item.text);
      }
    } else {
      return WrongType(rule, node, key, path);
    }
    // Known words in the table's order; what is not known keeps its place for the error.
    const auto rank = [&](const std::string& word) { return std::find(words.begin(), words.end(), word) - words.begin(); };
    if (std::all_of(chosen.begin(), chosen.end(), [&](const std::string& word) { return rank(word) < static_cast<long>(words.size()); })) {
      std::stable_sort(chosen.begin(), chosen.end(), [&](const std::string& a, const std::string& b) { return rank(a) < rank(b); });
    }
    reflection->ClearField(message, field);
    for (const std::string& word : chosen) reflection->AddString(message, field, word);
  }

  // NaN if it is not a whole number; values beyond 64 bits become infinite.
  static double WholeValue(const Node& node) {
    if (node.kind != Node::Kind::kScalar || node.quoted || !LooksWhole(node.text)) return std::nan("");
    double value;
    return absl::SimpleAtod(node.text, &value) ? value : std::nan("");
  }

  void Int(const Rule& rule, const Node& node, const Mark& key, Message* message, const FieldDescriptor* field, const std::string& path) {
    double value = WholeValue(node);
    if (*rule.zero_word && IsWord(node, rule.zero_word)) value = 0;
    if (std::isnan(value)) return WrongType(rule, node, key, path);
    if (value < rule.low || value > rule.high) return Add(key, path, absl::StrCat(node.text, " is out of range: use ", Describe(rule)));
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_INT32) {
      message->GetReflection()->SetInt32(message, field, static_cast<int32_t>(value));
    } else {
      message->GetReflection()->SetInt64(message, field, static_cast<int64_t>(value));
    }
  }

  void Ints(const Rule& rule, const Node& node, const Mark& key, Message* message, const FieldDescriptor* field, const std::string& path) {
    if (node.kind != Node::Kind::kList) return WrongType(rule, node, key, path);
    for (size_t i = 0; i < node.items.size(); ++i) {
      const double value = WholeValue(node.items[i]);
      const std::string place = absl::StrCat(path, "[", i, "]");
      Note(place, node.items[i].mark);
      if (!(value >= rule.low && value <= rule.high))
        return Add(node.items[i].mark, place, absl::StrCat("is ", Shown(node.items[i]), ", but must be ", Describe(rule)));
      message->GetReflection()->AddInt32(message, field, static_cast<int32_t>(value));
    }
  }

  void Number(const Rule& rule, const Node& node, const Mark& key, Message* message, const FieldDescriptor* field, const std::string& path) {
    if (*rule.zero_word && IsWord(node, rule.zero_word)) return message->GetReflection()->SetDouble(message, field, 0);
    if (node.kind != Node::Kind::kScalar || node.quoted) return WrongType(rule, node, key, path);
    const std::string lower = absl::AsciiStrToLower(node.text);
    const absl::string_view unsigned_text = absl::StripPrefix(absl::StripPrefix(lower, "-"), "+");
    double value;
    if (unsigned_text == ".inf" || unsigned_text == "inf" || unsigned_text == "infinity" || unsigned_text == ".nan" || unsigned_text == "nan") {
      return Add(key, path, absl::StrCat(node.text, " is not a finite number: use ", Describe(rule)));
    }
    if (!LooksDecimal(node.text) || !absl::SimpleAtod(node.text, &value)) return WrongType(rule, node, key, path);
    if (*rule.zero_word && value == 0) return Add(key, path, absl::StrCat("0 is out of range: use ", Describe(rule)));
    message->GetReflection()->SetDouble(message, field, value);
  }

  void Duration(const Rule& rule, const Node& node, const Mark& key, Message* message, const FieldDescriptor* field, const std::string& path) {
    absl::Duration duration;
    if (node.kind != Node::Kind::kScalar || !absl::ParseDuration(node.text, &duration) || duration == absl::InfiniteDuration() ||
        duration == -absl::InfiniteDuration() || (duration == absl::ZeroDuration() && node.text == "0")) {
      return WrongType(rule, node, key, path);
    }
    const int64_t seconds = absl::ToInt64Seconds(duration);
    if (duration < absl::Seconds(rule.low) || duration > absl::Seconds(rule.high)) {
      return Add(key, path, absl::StrCat(node.text, " is out of range: use ", rule.low, "s to ", static_cast<int64_t>(rule.high / 3600), "h"));
    }
    auto* out = static_cast<google::protobuf::Duration*>(message->GetReflection()->MutableMessage(message, field));
    out->set_seconds(seconds);
    out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration - absl::Seconds(seconds))));
  }

  void TextMap(const Rule& rule, const Node& node, const Mark& key, Message* message, const FieldDescriptor* field, const std::string& path) {
    if (node.kind != Node::Kind::kMap) return WrongType(rule, node, key, path);
    const Reflection* reflection = message->GetReflection();
    const FieldDescriptor* key_field = field->message_type()->map_key();
    const FieldDescriptor* value_field = field->message_type()->map_value();
    std::set<std::string> seen;
    for (const Entry& entry : node.entries) {
      const std::string place = Join(path, entry.key);
      Note(place, entry.mark);
      if (!seen.insert(entry.key).second) {
        Add(entry.mark, place, "is given twice: remove one");
        continue;
      }
      if (entry.value.kind != Node::Kind::kScalar) {
        Add(entry.mark, place, absl::StrCat("is ", Shown(entry.value), ", but must be a text"));
        continue;
      }
      Message* pair = reflection->AddMessage(message, field);
      pair->GetReflection()->SetString(pair, key_field, entry.key);
      pair->GetReflection()->SetString(pair, value_field, entry.value.text);
    }
  }

  v1::JobSpec* const spec_;
  ParseResult* const result_;
  const std::vector<std::string>& sources_;
  std::set<std::string> wrong_;
};

Mark OverrideMark(int source) { return Mark{source, 0, 0}; }

// "data.datasets[0].path" -> {"data", "datasets", "0", "path"}; empty if it is not a path.
std::vector<std::string> SplitPath(absl::string_view path) {
  std::vector<std::string> parts;
  for (absl::string_view part : absl::StrSplit(path, '.')) {
    const size_t bracket = part.find('[');
    parts.emplace_back(part.substr(0, bracket));
    while (!part.empty() && part.find('[') != absl::string_view::npos) {
      part.remove_prefix(part.find('[') + 1);
      const size_t close = part.find(']');
      if (close == absl::string_view::npos) return {};
      parts.emplace_back(part.substr(0, close));
      part.remove_prefix(close + 1);
    }
    if (parts.back().empty()) return {};
  }
  return parts;
}

// Puts `value` at `path` in the tree; an error in words, or "".
std::string Place(Node* root, const std::vector<std::string>& path, int source, Node value) {
  Node* node = root;
  std::string section;
  for (const std::string& part : path) {
    if (node->kind == Node::Kind::kList) {
      int index;
      if (!absl::SimpleAtoi(part, &index) || index < 0 || index > static_cast<int>(node->items.size())) {
        return absl::StrCat("\"", part, "\" is not an entry of this list; it has entries 0 to ", static_cast<int>(node->items.size()) - 1, ", and ",
                            node->items.size(), " adds one");
      }
      if (index == static_cast<int>(node->items.size())) node->items.push_back({Node::Kind::kNull, OverrideMark(source), "", false, {}, {}});
      node = &node->items[index];
    } else {
      if (node->kind == Node::Kind::kScalar) return absl::StrCat("\"", section, "\" is a value, not a group of keys");
      node->kind = Node::Kind::kMap;
      const absl::string_view name = ResolveAlias(section, part);
      auto entry = std::find_if(node->entries.begin(), node->entries.end(), [&](const Entry& e) { return ResolveAlias(section, e.key) == name; });
      if (entry == node->entries.end()) {
        node->entries.push_back({std::string(name), OverrideMark(source), {Node::Kind::kNull, OverrideMark(source), "", false, {}, {}}});
        entry = std::prev(node->entries.end());
      }
      if (&part == &path.back()) entry->mark = OverrideMark(source);
      node = &entry->value;
    }
    section = Join(section, part);
  }
  *node = std::move(value);
  return "";
}

void ApplyOverrides(const std::vector<std::string>& overrides, Node* root, std::vector<TreeError>* errors) {
  for (size_t i = 0; i < overrides.size(); ++i) {
    const int source = static_cast<int>(i) + 1;
    const size_t equals = overrides[i].find('=');
    const std::vector<std::string> path = SplitPath(absl::string_view(overrides[i]).substr(0, equals));
    if (equals == std::string::npos || path.empty()) {
      errors->push_back({OverrideMark(source), "is not of the form KEY=VALUE, such as --set training.max_steps=100"});
      continue;
    }
    const size_t before = errors->size();
    Node value = ReadTree(absl::string_view(overrides[i]).substr(equals + 1), source, errors);
    if (errors->size() > before) continue;
    if (const std::string error = Place(root, path, source, std::move(value)); !error.empty()) errors->push_back({OverrideMark(source), error});
  }
}

void CompleteDatasets(google::protobuf::RepeatedPtrField<v1::DatasetSpec>* datasets) {
  for (v1::DatasetSpec& dataset : *datasets) {
    if (dataset.source().empty()) dataset.set_source(dataset.path());
    for (const std::string& role : RolesOf(dataset.type())) {
      if (dataset.field_map().count(role) == 0) (*dataset.mutable_field_map())[role] = role;
    }
  }
}

// Defaults that follow from other fields.
void ApplyDependentDefaults(const std::set<std::string>& given, v1::JobSpec* spec) {
  v1::TrainingSpec* training = spec->mutable_training();
  if (!training->has_num_epochs() && !training->has_max_steps()) training->set_num_epochs(3);
  if (training->lr_scheduler() == "cosine_with_min_lr" && given.count("training.min_lr_ratio") == 0) training->set_min_lr_ratio(0.1);
  if (training->has_global_batch_size() && given.count("training.gradient_accumulation_steps") == 0) {
    const int per_round = training->micro_batch_size() * std::max(1, spec->parallel().data_parallel_size());
    if (per_round > 0 && training->global_batch_size() % per_round == 0) training->set_gradient_accumulation_steps(training->global_batch_size() / per_round);
  }
  CompleteDatasets(spec->mutable_data()->mutable_datasets());
  CompleteDatasets(spec->mutable_data()->mutable_test_datasets());
}

// A whole job as `ppctl get -o yaml` prints it: the spec within is meant, and what else is there is its state of then.
void EnterSpecOfJob(Node* root) {
  const auto entry = [&](absl::string_view key) {
    return std::find_if(root->entries.begin(), root->entries.end(), [&](const Entry& e) { return e.key == key; });
  };
  const auto spec = entry("spec");
  if (spec == root->entries.end() || spec->value.kind != Node::Kind::kMap || entry("id") == root->entries.end() || entry("status") == root->entries.end())
    return;
  Node inner = std::move(spec->value);
  *root = std::move(inner);
}

}  // namespace

ParseResult Parse(const std::string& file, absl::string_view text, const std::vector<std::string>& overrides) {
  ParseResult result;
  result.file = file;
  std::vector<std::string> sources = {file};
  for (const std::string& override : overrides) sources.push_back(absl::StrCat("--set ", override));
  Reader reader(&result.spec, &result, sources);
  std::vector<TreeError> broken;
  Node root = ReadTree(text, 0, &broken);
  const bool readable = broken.empty();
  EnterSpecOfJob(&root);
  ApplyOverrides(overrides, &root, &broken);
  for (const TreeError& error : broken) reader.Add(error.mark, "", error.message);

  reader.Defaults(&result.spec, "");
  reader.Read(root);
  ApplyDependentDefaults(result.given, &result.spec);
  // What a damaged text lacks may only have been lost in reading it.
  for (const Finding& finding : FindAll(result.spec)) {
    const auto wrong = [&](const std::string& field) { return reader.wrong().count(field) > 0; };
    if (wrong(finding.field) || std::any_of(finding.others.begin(), finding.others.end(), wrong)) continue;
    if (!readable && result.given.count(finding.field) == 0) continue;
    v1::Violation violation;
    violation.set_field(finding.field);
    violation.set_message(finding.message);
    FieldError error = result.Locate(violation);
    if (result.positions.count(finding.field) == 0) {
      for (const std::string& other : finding.others) {
        const auto at = result.positions.find(other);
        if (at == result.positions.end()) continue;
        std::tie(error.file, error.line, error.column) = std::tie(at->second.file, at->second.line, at->second.column);
        break;
      }
    }
    result.errors.push_back(std::move(error));
  }
  std::stable_sort(result.errors.begin(), result.errors.end(), [&](const FieldError& a, const FieldError& b) {
    return std::make_tuple(a.file != file, a.line, a.column) < std::make_tuple(b.file != file, b.line, b.column);
  });
  return result;
}

FieldError ParseResult::Locate(const v1::Violation& violation) const {
  std::string path = violation.field();
  while (!path.empty()) {
    const auto at = positions.find(path);
    if (at != positions.end()) return {at->second.file, at->second.line, at->second.column, violation.field(), violation.message()};
    const size_t cut = path.find_last_of(".[");
    path = cut == std::string::npos ? "" : path.substr(0, cut);
  }
  return {file, 1, 1, violation.field(), violation.message()};
}

std::string ToString(const FieldError& error) {
  const std::string place = error.line > 0 ? absl::StrCat(error.file, ":", error.line, ":", error.column) : error.file;
  return absl::StrCat(place, ": ", error.field, error.field.empty() ? "" : ": ", error.message);
}

}  // namespace ppft::spec
