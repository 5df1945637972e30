// How sizes and numbers are told to people, the same everywhere.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace ppft {

// "999 B", "12 KiB", "1.5 MiB", "320 MiB", "140.4 GiB", "2.0 TiB".
std::string FormatBytes(int64_t bytes);

// "1 step", "2 steps": of a noun that takes an s.
std::string Counted(int64_t count, absl::string_view noun);

}  // namespace ppft
