// One value of a job file: from the text that was written to the field of the message, by the rule of the table. Values that cannot be read leave the field as
// it was and an error; what the words mean together is checked afterwards.
#pragma once

#include <string>

#include "common/spec/notes.h"
#include "common/spec/schema.h"
#include "common/spec/yaml_tree.h"
#include "google/protobuf/message.h"

namespace ppft::spec {

// What is read, and where it goes. All of it outlives the call.
struct Leaf {
  const Rule& rule;
  const Node& node;
  const Mark& key;          // where its key stands
  const std::string& path;  // "training.max_steps"
  google::protobuf::Message* message = nullptr;
  const google::protobuf::FieldDescriptor* field = nullptr;  // of `message`
  Notes* notes = nullptr;
};

void ReadLeaf(const Leaf& leaf);

// The value in quotes, cut if it is long, or what it is instead of one.
std::string Shown(const Node& node);
bool IsWord(const Node& node, absl::string_view word);

}  // namespace ppft::spec
