#include "common/spec/overrides.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/spec/schema.h"

namespace ppft::spec {
namespace {

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

}  // namespace

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

}  // namespace ppft::spec
