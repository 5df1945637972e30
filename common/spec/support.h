// What job.yaml may say but the product cannot do yet. One table: a feature that works loses its line.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace ppft::spec {

// The refusal for a value of a field (pattern "data.datasets[].type"), as it is written in job.yaml; "" if it is supported.
std::string NotSupportedYet(absl::string_view pattern, absl::string_view value);

}  // namespace ppft::spec
