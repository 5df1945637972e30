// YAML text as a tree of plain values with positions. Only the part of YAML that a job file needs: one document, maps, lists, scalars. Anchors,
// aliases and tags are refused, and so are text that is not UTF-8, more than 1 MiB and deep nesting.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace ppft::spec {

struct Mark {
  int source = 0;  // 0: the file; n: override n - 1
  int line = 0;    // from 1; 0 in overrides
  int column = 0;
};

struct Node;
struct Entry;

struct Node {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  Mark mark;
  std::string text;     // scalar
  bool quoted = false;  // scalar in quotes or a block: always a text
  std::vector<Node> items;
  std::vector<Entry> entries;  // in file order, duplicates included
};

struct Entry {
  std::string key;
  Mark mark;  // of the key
  Node value;
};

struct TreeError {
  Mark mark;
  std::string message;
};

// Reads `text`; errors are appended. After a syntax error the tree holds what came before it.
Node ReadTree(absl::string_view text, int source, std::vector<TreeError>* errors);

// "text", "list", "group of keys", "nothing": for messages.
const char* KindName(const Node& node);

}  // namespace ppft::spec
