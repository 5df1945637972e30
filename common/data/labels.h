// Which tokens are supervised. One rule for all formats: what the model shall learn to write begins at a byte of the text, the boundary. Pure.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ppft::data {

struct LabelRule {
  size_t boundary = 0;      // first byte of the answer in the whole text
  bool everything = false;  // completion and train_on_inputs: all tokens but those that the tokenizer added
};

// For a token that stands for the bytes [begin, end); `added` by the tokenizer itself. A token that begins before the boundary belongs to the input
// even if it reaches into the answer; one that stands for nothing (a lone word mark) is no answer.
constexpr bool IsSupervised(const LabelRule& rule, size_t begin, size_t end, bool added) {
  if (added) return false;
  return rule.everything || (end > begin && begin >= rule.boundary);
}

}  // namespace ppft::data
