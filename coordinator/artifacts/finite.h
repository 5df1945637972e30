// NaN and infinite numbers in raw little-endian tensor bytes. PURE.
#pragma once

#include <cstdint>
#include <cstring>

#include "absl/strings/string_view.h"

namespace ppft::coordinator {

// A value is NaN or infinite when all bits of its exponent are set. No branch in the loop: the compiler makes vectors of it.
template <typename Word>
bool AnyExponentFull(absl::string_view bytes, Word exponent) {
  bool bad = false;
  for (size_t at = 0; at + sizeof(Word) <= bytes.size(); at += sizeof(Word)) {
    Word word;
    std::memcpy(&word, bytes.data() + at, sizeof(Word));
    bad |= (word & exponent) == exponent;
  }
  return bad;
}

// `bytes` begins at an element. Types other than F32, BF16 and F16 have no such values here.
inline bool HasNonFiniteBytes(absl::string_view dtype, absl::string_view bytes) {
  if (dtype == "F32") return AnyExponentFull<uint32_t>(bytes, 0x7F800000u);
  if (dtype == "BF16") return AnyExponentFull<uint16_t>(bytes, 0x7F80u);
  if (dtype == "F16") return AnyExponentFull<uint16_t>(bytes, 0x7C00u);
  return false;
}

}  // namespace ppft::coordinator
