// A job file's tree of values into the message: which key means which field, and what is said about keys that mean none.
#pragma once

#include "common/spec/notes.h"
#include "common/spec/yaml_tree.h"
#include "ppft/v1/spec.pb.h"

namespace ppft::spec {

// The defaults of all fields that do not depend on others.
void SetDefaults(v1::JobSpec* spec, Notes* notes);
// What SetDefaults makes of an empty message.
const v1::JobSpec& Defaults();

// What `root` says. Values that cannot be read leave the default and an error.
void ReadSpec(const Node& root, v1::JobSpec* spec, Notes* notes);

}  // namespace ppft::spec
