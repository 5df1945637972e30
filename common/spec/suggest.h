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

// What follows "X is not known": "; did you mean json? Use table, json or yaml" — without a near one ": use table, json or yaml".
std::string UseOneOf(absl::string_view word, const std::vector<std::string>& candidates);

// The same among names that people and machines give (jobs, models, datasets): at most three slips, however long the name; or the only name that begins
// with at least three letters that were written.
std::string NearestName(absl::string_view word, const std::vector<std::string>& names);

// no job "x"; did you mean "y"? See `ppctl list` — without a near name: no job "x": see `ppctl list`
std::string NotThere(absl::string_view kind, absl::string_view word, const std::vector<std::string>& names, absl::string_view command);

}  // namespace ppft::spec
