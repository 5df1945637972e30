#include "common/spec/suggest.h"

#include <algorithm>

#include "absl/strings/ascii.h"

namespace ppft::spec {

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

}  // namespace ppft::spec
