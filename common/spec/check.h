// Checks of a whole JobSpec, with the fields that each finding is about.
#pragma once

#include <string>
#include <vector>

#include "ppft/v1/spec.pb.h"

namespace ppft::spec {

struct Finding {
  std::string field;
  std::string message;
  std::vector<std::string> others;  // further fields that take part in a contradiction
};

std::vector<Finding> FindAll(const v1::JobSpec& spec);

}  // namespace ppft::spec
