// --set KEY=VALUE: values put into a job file's tree before it is read.
#pragma once

#include <string>
#include <vector>

#include "common/spec/yaml_tree.h"

namespace ppft::spec {

// Override i comes from source i + 1 of the marks. What is no KEY=VALUE, or whose place cannot be, is an error and changes nothing.
void ApplyOverrides(const std::vector<std::string>& overrides, Node* root, std::vector<TreeError>* errors);

}  // namespace ppft::spec
