#include "common/data/token_file.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace ppft::data {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 1 << 20;

absl::Status Damaged(absl::string_view what) { return absl::DataLossError(absl::StrCat("token file: ", what)); }

// The bytes of tensor `name` as values of T; what is checked here is the header's entry against the bytes that are there.
template <typename T>
absl::StatusOr<absl::Span<const T>> Tensor(const Json& header, const std::string& name, absl::string_view dtype, absl::string_view data) {
  const auto entry = header.find(name);
  if (entry == header.end() || !entry->is_object()) return Damaged(absl::StrCat("tensor ", name, " is missing"));
  const auto type = entry->find("dtype");
  const auto shape = entry->find("shape");
  const auto range = entry->find("data_offsets");
  if (type == entry->end() || !type->is_string() || type->get_ref<const std::string&>() != dtype)
    return Damaged(absl::StrCat(name, ": expected dtype ", dtype));
  if (shape == entry->end() || !shape->is_array() || shape->size() != 1 || !(*shape)[0].is_number_unsigned()) {
    return Damaged(absl::StrCat(name, ": expected a shape of one dimension"));
  }
  if (range == entry->end() || !range->is_array() || range->size() != 2 || !(*range)[0].is_number_unsigned() || !(*range)[1].is_number_unsigned()) {
    return Damaged(absl::StrCat(name, ": bad data_offsets"));
  }
  const uint64_t count = (*shape)[0].get<uint64_t>();
  const uint64_t begin = (*range)[0].get<uint64_t>();
  const uint64_t end = (*range)[1].get<uint64_t>();
  if (begin > end || end > data.size() || (end - begin) % sizeof(T) != 0 || (end - begin) / sizeof(T) != count) {
    return Damaged(absl::StrCat(name, ": shape [", count, "] and data_offsets [", begin, ", ", end, "] do not fit the file"));
  }
  const char* start = data.data() + begin;
  if (reinterpret_cast<uintptr_t>(start) % alignof(T) != 0) return Damaged(absl::StrCat(name, ": not aligned to ", alignof(T), " bytes"));
  return absl::Span<const T>(reinterpret_cast<const T*>(start), count);
}

absl::Status CheckValues(const TokenRows& rows) {
  if (rows.offsets.size() != rows.rows.size() + 1) return Damaged("offsets must have one entry more than rows");
  if (rows.ids.size() != rows.supervised.size()) return Damaged("ids and supervised differ in length");
  if (rows.offsets.front() != 0 || rows.offsets.back() != rows.num_tokens()) return Damaged("offsets do not run from 0 to the number of tokens");
  for (int64_t row = 0; row < rows.num_rows(); ++row) {
    const int64_t length = rows.length(row);
    if (rows.offsets[row] < 0 || rows.offsets[row] >= rows.offsets[row + 1] || length > std::numeric_limits<int32_t>::max()) {
      return Damaged(absl::StrCat("offsets are not ascending at row ", row));
    }
  }
  if (std::any_of(rows.supervised.begin(), rows.supervised.end(), [](uint8_t v) { return v > 1; }))
    return Damaged("supervised holds values other than 0 and 1");
  return absl::OkStatus();
}

}  // namespace

int64_t TokenRows::targets(int64_t row) const {
  const auto begin = supervised.begin() + offsets[row] + 1;
  return std::count(begin, supervised.begin() + offsets[row + 1], uint8_t{1});
}

absl::StatusOr<TokenFile> ParseTokenFile(absl::string_view bytes) {
  uint64_t header_size = 0;
  if (bytes.size() < sizeof(header_size)) return Damaged("shorter than 8 bytes");
  std::memcpy(&header_size, bytes.data(), sizeof(header_size));
  if (header_size > kMaxHeaderBytes || header_size > bytes.size() - sizeof(header_size)) return Damaged("the header is longer than the file or than 1 MiB");
  const char* begin = bytes.data() + sizeof(header_size);
  const Json header = Json::parse(begin, begin + header_size, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return Damaged("the header is not a JSON object");
  const absl::string_view data = bytes.substr(sizeof(header_size) + header_size);

  TokenFile file;
  PPFT_ASSIGN_OR_RETURN(file.rows.offsets, Tensor<int64_t>(header, "offsets", "I64", data));
  PPFT_ASSIGN_OR_RETURN(file.rows.rows, Tensor<int64_t>(header, "rows", "I64", data));
  PPFT_ASSIGN_OR_RETURN(file.rows.ids, Tensor<uint32_t>(header, "ids", "U32", data));
  PPFT_ASSIGN_OR_RETURN(file.rows.supervised, Tensor<uint8_t>(header, "supervised", "U8", data));
  PPFT_RETURN_IF_ERROR(CheckValues(file.rows));
  if (const auto metadata = header.find("__metadata__"); metadata != header.end()) {
    if (!metadata->is_object()) return Damaged("__metadata__ is not an object");
    for (const auto& [key, value] : metadata->items()) {
      if (!value.is_string()) return Damaged("__metadata__ holds something other than strings");
      file.metadata[key] = value.get<std::string>();
    }
  }
  return file;
}

std::string TokenFileHeader(int64_t num_rows, int64_t num_tokens, const std::map<std::string, std::string>& metadata) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  const auto add = [&](const char* name, const char* dtype, int64_t count, int64_t width) {
    header[name] = {{"dtype", dtype}, {"shape", {count}}, {"data_offsets", {offset, offset + count * width}}};
    offset += count * width;
  };
  add("offsets", "I64", num_rows + 1, 8);
  add("rows", "I64", num_rows, 8);
  add("ids", "U32", num_tokens, 4);
  add("supervised", "U8", num_tokens, 1);
  std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts at a multiple of 8
  const uint64_t size = text.size();
  std::string out(reinterpret_cast<const char*>(&size), sizeof(size));
  return out + text;
}

}  // namespace ppft::data
