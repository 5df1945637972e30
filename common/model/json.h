// Strict JSON for files that others wrote: no duplicate keys, bounded depth, valid UTF-8, one value and nothing after it. Header for .cc files
// of rooms that read model and adapter files. PURE.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace ppft::model {

// INVALID_ARGUMENT "source: what is wrong at which byte".
absl::StatusOr<nlohmann::json> ParseStrictJson(absl::string_view text, absl::string_view source, int max_depth = 32);
// The same, and the value must be an object.
absl::StatusOr<nlohmann::json> ParseStrictObject(absl::string_view text, absl::string_view source, int max_depth = 32);

// A value for an error message: at most 60 characters.
std::string ShortJson(const nlohmann::json& value);

}  // namespace ppft::model
