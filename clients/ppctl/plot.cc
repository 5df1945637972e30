#include "clients/ppctl/plot.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/ppctl/format.h"

namespace ppft::ctl {
namespace {

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void Add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  // Where `value` lies among `count` places.
  size_t Place(double value, size_t count) const {
    if (high <= low) return 0;
    const double at = (value - low) / (high - low) * static_cast<double>(count - 1);
    return std::min(count - 1, static_cast<size_t>(std::lround(at)));
  }
};

// The bit of a dot in a braille character of 2 x 4 dots.
constexpr uint8_t kDots[4][2] = {{0x01, 0x08}, {0x02, 0x10}, {0x04, 0x20}, {0x40, 0x80}};

// U+2800 + bits in UTF-8.
std::string Braille(uint8_t bits) {
  if (bits == 0) return " ";
  const unsigned code = 0x2800u + bits;
  return {static_cast<char>(0xE0 | (code >> 12)), static_cast<char>(0x80 | (code >> 6 & 0x3F)), static_cast<char>(0x80 | (code & 0x3F))};
}

}  // namespace

std::string Plot(const std::vector<Curve>& curves, size_t width, size_t height) {
  Range x, y;
  for (const Curve& curve : curves) {
    for (const auto& [at, value] : curve.points) {
      if (!std::isfinite(value)) continue;
      x.Add(at);
      y.Add(value);
    }
  }
  if (x.high < x.low) return "";
  const size_t label = std::max(FormatLoss(y.low).size(), FormatLoss(y.high).size());
  const size_t columns = std::max<size_t>(10, width > label + 3 ? width - label - 3 : 10);
  std::vector<std::vector<uint8_t>> dots(height, std::vector<uint8_t>(columns, 0));
  std::vector<std::vector<bool>> marks(height, std::vector<bool>(columns, false));
  std::string legend;
  for (size_t c = 0; c < curves.size(); ++c) {
    for (const auto& [at, value] : curves[c].points) {
      if (!std::isfinite(value)) continue;
      const size_t column = x.Place(at, columns * 2);
      const size_t row = height * 4 - 1 - y.Place(value, height * 4);
      if (c == 0) {
        dots[row / 4][column / 2] |= kDots[row % 4][column % 2];
      } else {
        marks[row / 4][column / 2] = true;
      }
    }
    if (!curves[c].points.empty()) absl::StrAppend(&legend, legend.empty() ? "" : "   ", c == 0 ? "⠒ " : "o ", curves[c].name);
  }
  std::string out;
  for (size_t row = 0; row < height; ++row) {
    const std::string value = row == 0 ? FormatLoss(y.high) : row + 1 == height ? FormatLoss(y.low) : "";
    std::string line = absl::StrCat(std::string(label - std::min(label, value.size()), ' '), value, value.empty() ? " │" : " ┤");
    for (size_t column = 0; column < columns; ++column) line += marks[row][column] ? std::string("o") : Braille(dots[row][column]);
    line.erase(line.find_last_not_of(' ') + 1);
    absl::StrAppend(&out, line, "\n");
  }
  const std::string first = absl::StrFormat("%.0f", x.low), last = absl::StrCat("step ", absl::StrFormat("%.0f", x.high));
  std::string axis;
  for (size_t column = 0; column < columns; ++column) axis += "─";
  absl::StrAppend(&out, std::string(label + 1, ' '), "└", axis, "\n", std::string(label + 2, ' '), first,
                  std::string(columns > first.size() + last.size() ? columns - first.size() - last.size() : 1, ' '), last, "\n", std::string(label + 2, ' '),
                  legend, "\n");
  return out;
}

}  // namespace ppft::ctl
