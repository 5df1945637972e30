#include "common/spec/reader.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/spec/leaf.h"
#include "common/spec/schema.h"
#include "common/spec/suggest.h"
#include "common/spec/support.h"

namespace ppft::spec {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

class Reader {
 public:
  Reader(v1::JobSpec* spec, Notes* notes) : spec_(spec), notes_(notes) {}

  void Read(const Node& root) {
    if (root.kind == Node::Kind::kNull) return;
    if (root.kind != Node::Kind::kMap)
      return notes_->Add(root.mark, "", absl::StrCat("the file holds a ", KindName(root), ", not keys with values such as model: {base_model: NAME}"));
    Group(root, spec_, "");
  }

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
      const Node fallback = ReadTree(rule->fallback, 0, &none);
      ReadLeaf({.rule = *rule, .node = fallback, .key = Mark{}, .path = path, .message = message, .field = field, .notes = notes_});
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
        notes_->Add(entry.mark, Join(prefix, entry.key), absl::StrCat("is given twice", before, other, ": remove one"));
        continue;
      }
      notes_->Note(path, entry.mark);
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
      notes_->Given(path);
      return ReadLeaf({.rule = *rule, .node = entry.value, .key = entry.mark, .path = path, .message = message, .field = field, .notes = notes_});
    }
    notes_->Given(path);
    if (field->is_repeated()) return Groups(entry, message, field, path);
    if (entry.value.kind != Node::Kind::kMap)
      return notes_->Add(entry.mark, path, absl::StrCat("is ", Shown(entry.value), ", but must be a group of keys: ", KeysOf(field->message_type())));
    Group(entry.value, message->GetReflection()->MutableMessage(message, field), path);
  }

  void Groups(const Entry& entry, Message* message, const FieldDescriptor* field, const std::string& path) {
    if (entry.value.kind != Node::Kind::kList) {
      return notes_->Add(
          entry.mark, path,
          absl::StrCat("is ", Shown(entry.value), ", but must be a list: begin each entry with \"- \" and give it ", KeysOf(field->message_type())));
    }
    for (size_t i = 0; i < entry.value.items.size(); ++i) {
      const Node& item = entry.value.items[i];
      const std::string place = absl::StrCat(path, "[", i, "]");
      notes_->Note(place, item.mark);
      Message* element = message->GetReflection()->AddMessage(message, field);
      if (item.kind == Node::Kind::kMap) {
        Group(item, element, place);
      } else {
        notes_->Add(item.mark, place, absl::StrCat("is ", Shown(item), ", but must be a group of keys: ", KeysOf(field->message_type())));
        for (const char* key : {".path", ".type"}) notes_->Wrong(place + key);
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
      if (!refusal.empty()) return notes_->Add(entry.mark, path, refusal);
    }
    if (items.empty()) notes_->Add(entry.mark, path, absl::StrCat("is empty: leave it out or use ", rule.fallback));
  }

  void Unknown(const Entry& entry, const std::string& prefix, const Descriptor* descriptor) {
    std::vector<std::string> names;
    for (int i = 0; i < descriptor->field_count(); ++i) names.push_back(descriptor->field(i)->name());
    const std::string path = Join(prefix, entry.key.empty() ? "\"\"" : entry.key.substr(0, 100));
    std::string message = "is not a known key";
    std::string meant = Nearest(entry.key, names);
    if (!meant.empty()) {
      notes_->Wrong(Join(prefix, meant));
      meant = absl::StrCat("; did you mean ", meant, "?");
    } else if (const std::string elsewhere = Elsewhere(entry.key); !elsewhere.empty()) {
      notes_->Wrong(elsewhere);
      meant = absl::StrCat("; did you mean ", elsewhere, "?");
    } else {
      meant = absl::StrCat(prefix.empty() ? "; the keys here are " : absl::StrCat("; the keys of ", prefix, " are "), absl::StrJoin(names, ", "));
    }
    notes_->Add(entry.mark, path, message + meant);
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

  v1::JobSpec* const spec_;
  Notes* const notes_;
};

}  // namespace

void SetDefaults(v1::JobSpec* spec, Notes* notes) { Reader(spec, notes).Defaults(spec, ""); }

const v1::JobSpec& Defaults() {
  static const auto* const defaults = [] {
    ParseResult scratch;
    const std::vector<std::string> no_sources = {""};
    Notes notes(&scratch, no_sources);
    SetDefaults(&scratch.spec, &notes);
    return new v1::JobSpec(std::move(scratch.spec));
  }();
  return *defaults;
}

void ReadSpec(const Node& root, v1::JobSpec* spec, Notes* notes) { Reader(spec, notes).Read(root); }

}  // namespace ppft::spec
