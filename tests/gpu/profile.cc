#include "tests/gpu/profile.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

namespace profiler = torch::autograd::profiler;
namespace impl = torch::profiler::impl;

struct Sum {
  std::string name;
  double microseconds = 0;
  int64_t calls = 0;
};

// Without parameter types and template arguments past the first hundred letters.
std::string Short(std::string name) {
  if (name.rfind("void ", 0) == 0) name = name.substr(5);
  return name.substr(0, 110);
}

absl::Status PrintTable(const std::string& title, const std::string& file, int steps) {
  std::ifstream in(file);
  const nlohmann::json trace = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!trace.is_object() || !trace.contains("traceEvents")) return absl::InternalError(absl::StrCat(file, " is no trace"));
  std::map<std::string, Sum> by_name;
  std::vector<std::pair<double, double>> spans;  // begin, end
  for (const nlohmann::json& event : trace["traceEvents"]) {
    const std::string category = event.value("cat", "");
    if (category != "kernel" && category != "gpu_memcpy" && category != "gpu_memset") continue;
    const double begin = event.value("ts", 0.0), duration = event.value("dur", 0.0);
    Sum& sum = by_name[Short(event.value("name", ""))];
    sum.microseconds += duration;
    ++sum.calls;
    spans.emplace_back(begin, begin + duration);
  }
  if (spans.empty()) return absl::InternalError(absl::StrCat(file, " holds no kernels: the profiler found no CUPTI"));
  std::sort(spans.begin(), spans.end());
  double busy = 0, end = spans.front().first;
  for (const auto& [from, to] : spans) {
    busy += std::max(0.0, to - std::max(from, end));
    end = std::max(end, to);
  }
  std::vector<Sum> sums;
  for (auto& [name, sum] : by_name) {
    sum.name = name;
    sums.push_back(sum);
  }
  std::sort(sums.begin(), sums.end(), [](const Sum& a, const Sum& b) { return a.microseconds > b.microseconds; });
  std::printf("profile of %s: %.0f us busy of %.0f us a step, %zu kernels a step\n", title.c_str(), busy / steps, (end - spans.front().first) / steps,
              spans.size() / static_cast<size_t>(steps));
  std::printf("%10s %7s %8s  %s\n", "us/step", "calls", "us/call", "kernel");
  for (const Sum& sum : sums) {
    std::printf("%10.1f %7.1f %8.1f  %s\n", sum.microseconds / steps, static_cast<double>(sum.calls) / steps, sum.microseconds / static_cast<double>(sum.calls),
                sum.name.c_str());
  }
  std::fflush(stdout);
  return absl::OkStatus();
}

}  // namespace

absl::Status ProfileSteps(const std::string& title, const std::string& file, int steps, const std::function<absl::Status()>& body) {
  return CatchTorch("profiler", [&]() -> absl::Status {
    const impl::ProfilerConfig config(impl::ProfilerState::KINETO);
    const std::set<impl::ActivityType> activities = {impl::ActivityType::CUDA};
    profiler::prepareProfiler(config, activities);
    profiler::enableProfiler(config, activities);
    const absl::Status done = body();
    const std::unique_ptr<profiler::ProfilerResult> result = profiler::disableProfiler();
    PPFT_RETURN_IF_ERROR(done);
    std::remove(file.c_str());
    result->save(file);
    return PrintTable(title, file, steps);
  });
}

}  // namespace ppft::trainer
