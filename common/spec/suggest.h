// "Did you mean": the nearest of some words.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace ppft::spec {

// Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`.
int EditDistance(absl::string_view a, absl::string_view b);

// The nearest candidate if it is near enough to be a slip (a third of its length), else "". The first of equals wins.
std::string Nearest(absl::string_view word, const std::vector<std::string>& candidates);

}  // namespace ppft::spec
