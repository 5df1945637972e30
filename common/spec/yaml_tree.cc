#include "common/spec/yaml_tree.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <memory>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/spec/spec.h"

namespace ppft::spec {
namespace {

constexpr int kMaxDepth = 32;

struct TooDeep {
  YAML::Mark mark;
};

// Length of the UTF-8 character at text[at], 0 if there is none that YAML allows in a text.
size_t CharacterLength(absl::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned first = byte(at);
  if (first < 0x80) return (first >= 0x20 && first != 0x7F) || first == '\n' || first == '\r' || first == '\t' ? 1 : 0;
  const size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return 0;
  }
  const unsigned second = byte(at + 1);
  const bool overlong = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
  const bool surrogate = first == 0xED && second >= 0xA0;
  const bool beyond = first == 0xF4 && second >= 0x90;
  return overlong || surrogate || beyond ? 0 : length;
}

bool CheckText(absl::string_view text, int source, std::vector<TreeError>* errors) {
  Mark at{source, 1, 1};
  for (size_t i = 0; i < text.size();) {
    const size_t length = CharacterLength(text, i);
    if (length == 0) {
      errors->push_back({at, absl::StrFormat("byte 0x%02x is not text: the file must be UTF-8 text in YAML", static_cast<unsigned char>(text[i]))});
      return false;
    }
    if (text[i] == '\n') {
      ++at.line;
      at.column = 1;
    } else {
      ++at.column;
    }
    i += length;
  }
  return true;
}

// Builds the tree from the parser's events.
class Builder : public YAML::EventHandler {
 public:
  Builder(int source, std::vector<TreeError>* errors) : source_(source), errors_(errors) {}

  int documents() const { return documents_; }
  // After a syntax error groups stand as far as they were read, and lists that may lack entries are left out.
  Node TakeRoot() {
    while (!levels_.empty()) {
      if (levels_.back().node.kind == Node::Kind::kList) {
        levels_.pop_back();
        if (!levels_.empty()) levels_.back().has_key = false;
      } else {
        Close();
      }
    }
    return std::move(root_);
  }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ == 2) errors_->push_back({At(mark), "a second document begins here: a job file holds one (remove this \"---\" and what follows)"});
  }
  void OnDocumentEnd() override {}

  void OnAnchor(const YAML::Mark& mark, const std::string& name) override {
    errors_->push_back({At(mark), absl::StrCat("YAML anchors (&", name, ") are not allowed: write the value where it is used")});
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    errors_->push_back({At(mark), "YAML aliases (*name) are not allowed: write the value where it is used"});
    Put(Leaf(Node::Kind::kNull, mark), mark);
  }
  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override { Put(Leaf(Node::Kind::kNull, mark), mark); }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, const std::string& value) override {
    RefuseTag(mark, tag);
    Node node = Leaf(Node::Kind::kScalar, mark);
    node.text = value;
    node.quoted = tag == "!";
    Put(std::move(node), mark);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, YAML::EmitterStyle::value) override {
    Open(Node::Kind::kList, mark, tag);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, YAML::EmitterStyle::value) override { Open(Node::Kind::kMap, mark, tag); }
  void OnMapEnd() override { Close(); }

 private:
  struct Level {
    Node node;
    bool has_key = false;
    std::string key;
    Mark key_mark;
  };

  Mark At(const YAML::Mark& mark) const { return mark.is_null() ? Mark{source_, 1, 1} : Mark{source_, mark.line + 1, mark.column + 1}; }

  Node Leaf(Node::Kind kind, const YAML::Mark& mark) const {
    Node node;
    node.kind = kind;
    node.mark = At(mark);
    return node;
  }

  void RefuseTag(const YAML::Mark& mark, const std::string& tag) {
    if (!tag.empty() && tag != "?" && tag != "!") errors_->push_back({At(mark), absl::StrCat("YAML tags (", tag, ") are not allowed: write the plain value")});
  }

  void Open(Node::Kind kind, const YAML::Mark& mark, const std::string& tag) {
    RefuseTag(mark, tag);
    if (levels_.size() >= kMaxDepth) throw TooDeep{mark};
    levels_.push_back({Leaf(kind, mark)});
  }

  void Close() {
    Node node = std::move(levels_.back().node);
    levels_.pop_back();
    const Mark mark = node.mark;
    Place(std::move(node), mark);
  }

  void Put(Node node, const YAML::Mark& mark) { Place(std::move(node), At(mark)); }

  // A finished value goes into the open map or list, or is the key that a map waits for, or is the root.
  void Place(Node node, const Mark& mark) {
    if (levels_.empty()) {
      if (documents_ <= 1) root_ = std::move(node);
      return;
    }
    Level& level = levels_.back();
    if (level.node.kind == Node::Kind::kList) {
      level.node.items.push_back(std::move(node));
    } else if (!level.has_key) {
      if (node.kind != Node::Kind::kScalar) errors_->push_back({mark, absl::StrCat("a key must be a word, not a ", KindName(node))});
      level.has_key = true;
      level.key = node.text;
      level.key_mark = mark;
    } else {
      level.has_key = false;
      level.node.entries.push_back({std::move(level.key), level.key_mark, std::move(node)});
    }
  }

  const int source_;
  std::vector<TreeError>* const errors_;
  int documents_ = 0;
  std::vector<Level> levels_;
  Node root_;
};

void ForgetLines(Node* node) {
  node->mark.line = node->mark.column = 0;
  for (Node& item : node->items) ForgetLines(&item);
  for (Entry& entry : node->entries) {
    entry.mark.line = entry.mark.column = 0;
    ForgetLines(&entry.value);
  }
}

}  // namespace

Node ReadTree(absl::string_view text, int source, std::vector<TreeError>* errors) {
  if (text.size() > kMaxYamlBytes) {
    errors->push_back({Mark{source, 1, 1}, absl::StrCat("the file has ", text.size(), " bytes; a job file has at most ", kMaxYamlBytes)});
    return {};
  }
  if (text.substr(0, 3) == "\xEF\xBB\xBF") text.remove_prefix(3);
  if (!CheckText(text, source, errors)) return {};
  Builder builder(source, errors);
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    while (builder.documents() < 2 && parser.HandleNextDocument(builder)) {
    }
  } catch (const TooDeep& deep) {
    errors->push_back({Mark{source, deep.mark.line + 1, deep.mark.column + 1}, absl::StrCat("nested more than ", kMaxDepth, " levels deep")});
  } catch (const YAML::Exception& e) {
    const Mark at = e.mark.is_null() ? Mark{source, 1, 1} : Mark{source, e.mark.line + 1, e.mark.column + 1};
    errors->push_back({at, absl::StrCat("not valid YAML: ", e.msg, " (check brackets, quotes and indentation here and in the lines before)")});
  }
  Node root = builder.TakeRoot();
  if (source > 0) {
    ForgetLines(&root);
    for (TreeError& error : *errors) {
      if (error.mark.source == source) error.mark.line = error.mark.column = 0;
    }
  }
  return root;
}

const char* KindName(const Node& node) {
  switch (node.kind) {
    case Node::Kind::kNull:
      return "nothing";
    case Node::Kind::kScalar:
      return "text";
    case Node::Kind::kList:
      return "list";
    case Node::Kind::kMap:
      return "group of keys";
  }
  return "";
}

}  // namespace ppft::spec
