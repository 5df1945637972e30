// A curve on a terminal. Pure.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace ppft::ctl {

struct Curve {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x ascending; what is not finite is left out
};

// Dots in braille characters, `width` columns and `height` rows for the area of all curves, with an axis and a legend. The second curve's points are marked
// with "o". "" if no curve has a point.
std::string Plot(const std::vector<Curve>& curves, size_t width, size_t height);

}  // namespace ppft::ctl
