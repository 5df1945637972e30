// A whole token file in memory.
#pragma once

#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/data/token_file.h"

namespace ppft::data {

inline std::string TokenFileBytes(const TokenRows& rows, const std::map<std::string, std::string>& metadata) {
  const auto bytes = [](auto values) { return absl::string_view(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0])); };
  return absl::StrCat(TokenFileHeader(rows.num_rows(), rows.num_tokens(), metadata), bytes(rows.offsets), bytes(rows.rows), bytes(rows.ids),
                      bytes(rows.supervised));
}

}  // namespace ppft::data
