#include "common/spec/suggest.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace ppft::spec {
namespace {

constexpr size_t kMostSlips = 3;
constexpr size_t kLeastPrefix = 3;
constexpr size_t kLongestName = 255;

}  // namespace

int EditDistance(absl::string_view a, absl::string_view b) {
  // Three rows of the optimal string alignment table.
  std::vector<int> before(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) last[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) row[j] = std::min(row[j], before[j - 2] + 1);
    }
    before.swap(last);
    last.swap(row);
  }
  return last[b.size()];
}

std::string Nearest(absl::string_view word, const std::vector<std::string>& candidates) {
  if (word.size() > 64) return "";
  const std::string lower = absl::AsciiStrToLower(word);
  std::string best;
  int best_distance = 1 << 20;
  for (const std::string& candidate : candidates) {
    const int distance = EditDistance(lower, absl::AsciiStrToLower(candidate));
    const int allowed = std::max<int>(1, static_cast<int>(candidate.size()) / 3);
    const bool alike = distance < static_cast<int>(std::max(word.size(), candidate.size()));  // something of it stands there
    if (alike && distance <= allowed && distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

std::string UseOneOf(absl::string_view word, const std::vector<std::string>& candidates) {
  const std::string nearest = Nearest(word, candidates);
  std::string text = nearest.empty() ? ": use " : absl::StrCat("; did you mean ", nearest, "? Use ");
  for (size_t i = 0; i < candidates.size(); ++i) absl::StrAppend(&text, i == 0 ? "" : i + 1 < candidates.size() ? ", " : " or ", candidates[i]);
  return text;
}

std::string NearestName(absl::string_view word, const std::vector<std::string>& names) {
  if (word.size() > kLongestName) return "";
  const std::string lower = absl::AsciiStrToLower(word);
  const std::string *best = nullptr, *longer = nullptr;
  int best_distance = kMostSlips + 1, num_longer = 0;
  for (const std::string& name : names) {
    const std::string candidate = absl::AsciiStrToLower(name);
    if (lower.size() >= kLeastPrefix && absl::StartsWith(candidate, lower)) {
      num_longer += longer == nullptr || *longer != name;
      longer = &name;
    }
    const size_t shorter = std::min(lower.size(), candidate.size());
    if (std::max(lower.size(), candidate.size()) - shorter > kMostSlips) continue;
    const int distance = EditDistance(lower, candidate);
    if (distance >= best_distance || distance > std::max<int>(1, static_cast<int>(shorter) / 3) || distance >= static_cast<int>(shorter)) continue;
    best = &name;
    best_distance = distance;
  }
  if (best == nullptr && num_longer == 1) best = longer;
  return best == nullptr ? "" : *best;
}

std::string NotThere(absl::string_view kind, absl::string_view word, const std::vector<std::string>& names, absl::string_view command) {
  const std::string nearest = NearestName(word, names);
  return absl::StrCat("no ", kind, " \"", word, "\"", nearest.empty() ? ": see `" : absl::StrCat("; did you mean \"", nearest, "\"? See `"), command, "`");
}

}  // namespace ppft::spec
