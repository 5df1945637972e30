// What reading a job file brings to light: errors, where each key stands, and which fields came to nothing.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "common/spec/spec.h"
#include "common/spec/yaml_tree.h"

namespace ppft::spec {

class Notes {
 public:
  // `sources`: the names of the file and of the overrides, by Mark::source. Both outlive this object.
  Notes(ParseResult* result, const std::vector<std::string>& sources) : result_(result), sources_(sources) {}

  void Add(const Mark& mark, const std::string& field, const std::string& message) {
    result_->errors.push_back({sources_[static_cast<size_t>(mark.source)], mark.line, mark.column, field, message});
    Wrong(field);
  }
  // `field` was probably meant by something that is an error already.
  void Wrong(const std::string& field) { result_->wrong.insert(field); }
  void Note(const std::string& path, const Mark& mark) { result_->positions[path] = {sources_[static_cast<size_t>(mark.source)], mark.line, mark.column}; }
  void Given(const std::string& path) { result_->given.insert(path); }

  bool is_wrong(const std::string& field) const { return result_->wrong.count(field) > 0; }

 private:
  ParseResult* const result_;
  const std::vector<std::string>& sources_;
};

}  // namespace ppft::spec
