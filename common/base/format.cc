#include "common/base/format.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace ppft {

std::string FormatBytes(int64_t bytes) {
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes) / 1024;
  const char* unit = "KiB";
  for (const char* larger : {"MiB", "GiB", "TiB"}) {
    if (value < 1024) break;
    value /= 1024;
    unit = larger;
  }
  // Devices and plans are told apart by tenths of a GiB.
  const bool whole = value >= 10 && (unit[0] == 'K' || unit[0] == 'M');
  return whole ? absl::StrFormat("%.0f %s", value, unit) : absl::StrFormat("%.1f %s", value, unit);
}

std::string Counted(int64_t count, absl::string_view noun) { return absl::StrCat(count, " ", noun, count == 1 ? "" : "s"); }

}  // namespace ppft
