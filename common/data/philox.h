// Philox 4x32-10 (Salmon et al., SC'11): a counter-based random generator. A number is a pure function of (key, counter), so any part of a
// sequence can be made anywhere, in any order and on any partition, with the same result. The product's only source of randomness in training:
// shuffle, held-out rows, adapter initialisation and dropout. Pure, any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace ppft::data {

using PhiloxBlock = std::array<uint32_t, 4>;

// Ten rounds over `counter` under `key`. Equals the reference implementation's known answers.
constexpr PhiloxBlock Philox4x32(PhiloxBlock counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b), static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// What a sequence is for: part of the counter, so that two uses under one seed never share numbers.
enum class PhiloxDomain : uint32_t { kShuffle = 1, kHeldOut = 2, kAdapterInit = 3, kDropout = 4 };

// One sequence of numbers: key = seed, counter = (position low, position high, stream, domain).
class PhiloxStream {
 public:
  constexpr PhiloxStream(uint64_t seed, PhiloxDomain domain, uint32_t stream)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, stream_(stream), domain_(static_cast<uint32_t>(domain)) {}

  constexpr uint32_t Next() {
    if (used_ == 4) {
      block_ = Philox4x32({static_cast<uint32_t>(position_), static_cast<uint32_t>(position_ >> 32), stream_, domain_}, key_);
      ++position_;
      used_ = 0;
    }
    return block_[used_++];
  }
  constexpr uint64_t Next64() {
    const uint64_t low = Next();
    return low | (uint64_t{Next()} << 32);
  }
  // Uniform in [0, bound), without bias; bound >= 1.
  constexpr uint64_t Below(uint64_t bound) {
    const uint64_t limit = UINT64_MAX - UINT64_MAX % bound;  // values at or above it would favour the small results
    uint64_t value = Next64();
    while (value >= limit) value = Next64();
    return value % bound;
  }

 private:
  std::array<uint32_t, 2> key_;
  uint32_t stream_;
  uint32_t domain_;
  uint64_t position_ = 0;
  PhiloxBlock block_{};
  int used_ = 4;
};

// Fisher-Yates from the back: for i = n-1 … 1 swap items[i] and items[Below(i + 1)].
template <typename T>
void Shuffle(PhiloxStream& random, std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.Below(i)]);
}

}  // namespace ppft::data
