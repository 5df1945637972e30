// Speed of one stage that holds a whole model of random weights: forward, backward and optimizer step. One JSON line per case.
//
//   step_bench [CASE …] [--steps N] [--path cudnn|flash] [--checkpointing none|selective|full] [--no-graphs] [--profile FOLDER]
//       CASE: 1b:8x2048, 1b:1x512, 8b:4x2048, 1b:ragged (default: 1b:8x2048 1b:1x512)
//
// The median of N (20) steps after 5 to warm up, the device waited for at both ends of each step. LoRA r = 16 on all seven linears, bf16, AdamW.
// --profile: three further steps under libtorch's profiler; a table by kernel on standard output, a Chrome trace of each case in the folder.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/randint.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>

#include "common/base/status.h"
#include "tests/gpu/model.h"
#include "tests/gpu/profile.h"
#include "worker/trainer/cuda/loader.h"

namespace ppft::trainer {
namespace {

using Clock = std::chrono::steady_clock;

struct Case {
  std::string name;
  model::ModelConfig config;
  std::vector<int32_t> cu_seqlens = {0};
};

absl::StatusOr<Case> ParseCase(const std::string& text) {
  Case c;
  c.name = text;
  const std::string model = text.substr(0, text.find(':')), shape = text.substr(std::min(text.size(), model.size() + 1));
  if (model == "1b") {
    c.config = ConfigOf(2048, 8192, 16, 32, 8, 64, 128256, /*tied=*/true);
  } else if (model == "8b") {
    c.config = ConfigOf(4096, 14336, 32, 32, 8, 128, 128256, /*tied=*/false);
  } else {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": the model is 1b or 8b"));
  }
  if (shape == "ragged") {
    // Documents of 100 to 2000 tokens, 16384 in all.
    uint32_t state = 1;
    while (c.cu_seqlens.back() < 16384) {
      state = state * 1664525u + 1013904223u;
      c.cu_seqlens.push_back(std::min<int32_t>(16384, c.cu_seqlens.back() + 100 + static_cast<int32_t>((state >> 8) % 1901)));
    }
    return c;
  }
  int rows = 0, length = 0;
  if (std::sscanf(shape.c_str(), "%dx%d", &rows, &length) != 2 || rows < 1 || length < 2) {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": the shape is ROWSxLENGTH or ragged"));
  }
  for (int i = 0; i < rows; ++i) c.cu_seqlens.push_back(c.cu_seqlens.back() + length);
  return c;
}

// Every token but each document's first is a target.
MicrobatchInput InputOf(const Case& c) {
  MicrobatchInput input;
  input.cu_seqlens = c.cu_seqlens;
  const int64_t tokens = c.cu_seqlens.back();
  at::manual_seed(1);
  input.ids = at::randint(c.config.vocab_size, {tokens}, at::kLong);
  std::vector<at::Tensor> rows;
  for (size_t d = 0; d + 1 < c.cu_seqlens.size(); ++d) rows.push_back(at::arange(c.cu_seqlens[d], c.cu_seqlens[d + 1] - 1, at::kLong));
  input.target_rows = at::cat(rows);
  input.target_ids = input.ids.index_select(0, input.target_rows + 1);
  input.loss_weight = 1.0 / static_cast<double>(input.target_rows.size(0));
  return input;
}

// FLOPs of a step by the design's formula: 4 (linear weights + head) + attention forward and backward + 6 per adapter weight, a token.
double FlopsOf(const Case& c, int64_t adapter_weights) {
  const model::ModelConfig& m = c.config;
  const double linear = static_cast<double>(m.num_layers) * (static_cast<double>(m.hidden_size) * (m.query_size() + 2 * m.key_value_size()) +
                                                             static_cast<double>(m.query_size()) * m.hidden_size + 3.0 * m.hidden_size * m.intermediate_size);
  const double head = static_cast<double>(m.hidden_size) * m.vocab_size;
  double attention = 0;  // 2 products of n^2 / 2 * head_dim multiply-adds forward, 2.5 times that backward
  for (size_t d = 0; d + 1 < c.cu_seqlens.size(); ++d) {
    const double n = c.cu_seqlens[d + 1] - c.cu_seqlens[d];
    attention += 3.5 * 2.0 * n * n * static_cast<double>(m.query_size() * m.num_layers);
  }
  return c.cu_seqlens.back() * (4 * (linear + head) + 6.0 * static_cast<double>(adapter_weights)) + attention;
}

struct Settings {
  int steps = 20;
  model::ActivationCheckpointing checkpointing = model::ActivationCheckpointing::kNone;
  bool capture = true;
  std::string profile;  // folder of the traces; empty: none
};

absl::Status RunCase(CudaRuntime& gpu, const Case& c, const Settings& settings) {
  constexpr int kWarmUp = 5, kProfiled = 3;
  const int steps = settings.steps;
  StageOptions options;
  options.checkpointing = settings.checkpointing;
  options.num_layers = static_cast<int>(c.config.num_layers);
  options.has_embedding = options.has_head = true;
  options.compute = at::kBFloat16;
  options.lora = {16, 2.0, 0.0, 42, AllTargets()};
  options.head_chunk_rows = settings.checkpointing == model::ActivationCheckpointing::kFull ? 1024 : 2048;
  options.least_tokens = c.cu_seqlens.back();
  options.capture = settings.capture;
  options.device = at::Device(at::kCUDA, 0);
  options.kernels = &gpu.KernelsOf(0);
  gpu.ReleaseCachedMemory();
  gpu.ResetPeakMemory(0);
  PPFT_ASSIGN_OR_RETURN(const auto stage,
                        StageModel::Create(c.config, options, RandomSource(c.config, at::TensorOptions(at::kBFloat16).device(options.device))));
  const FlatParameters flat = stage->flat_parameters();
  const auto optimizer = gpu.MakeOptimizer(flat);
  const MicrobatchInput input = InputOf(c);
  const AdamWOptions adamw;
  std::vector<double> seconds, queued;
  double first = 0, last = 0;
  const auto one = [&](int step) -> absl::Status {
    gpu.Synchronize(0);
    const auto begin = Clock::now();
    PPFT_RETURN_IF_ERROR(stage->Forward(input, at::Tensor(), true, nullptr).status());
    PPFT_RETURN_IF_ERROR(stage->Backward(input, at::Tensor()).status());
    const auto given = Clock::now();  // all work is queued: the host's share
    const double norm = std::sqrt(optimizer->GradientSquares().sum().item<double>());
    optimizer->Step(adamw, step + 1, 1e-4, ClipFactor(norm, 1.0));
    stage->ZeroGradients();
    gpu.Synchronize(0);
    const auto end = Clock::now();
    last = stage->loss_total().item<double>() * input.loss_weight;
    stage->loss_total().zero_();
    if (step == 0) first = last;
    if (step < kWarmUp) return absl::OkStatus();
    seconds.push_back(std::chrono::duration<double>(end - begin).count());
    queued.push_back(std::chrono::duration<double>(given - begin).count());
    return absl::OkStatus();
  };
  for (int step = 0; step < steps + kWarmUp; ++step) PPFT_RETURN_IF_ERROR(one(step));
  std::sort(seconds.begin(), seconds.end());
  std::sort(queued.begin(), queued.end());
  const double median = seconds[seconds.size() / 2], tokens = c.cu_seqlens.back();
  const CudaMemory memory = gpu.Memory(0);
  nlohmann::json line = {{"case", c.name},
                         {"checkpointing", settings.checkpointing == model::ActivationCheckpointing::kNone   ? "none"
                                           : settings.checkpointing == model::ActivationCheckpointing::kFull ? "full"
                                                                                                             : "selective"},
                         {"tokens", tokens},
                         {"documents", c.cu_seqlens.size() - 1},
                         {"step_ms", median * 1e3},
                         {"host_ms", queued[queued.size() / 2] * 1e3},
                         {"tokens_per_second", tokens / median},
                         {"tflops", FlopsOf(c, flat.master.numel()) / median / 1e12},
                         {"peak_allocated_gib", static_cast<double>(memory.peak_allocated_bytes) / (1 << 30)},
                         {"peak_reserved_gib", static_cast<double>(memory.peak_reserved_bytes) / (1 << 30)},
                         {"first_loss", first},
                         {"last_loss", last}};
  std::cout << line.dump() << std::endl;
  if (settings.profile.empty()) return absl::OkStatus();
  std::string file = absl::StrCat(settings.profile, "/", c.name, ".json");
  std::replace(file.begin() + static_cast<std::ptrdiff_t>(settings.profile.size()), file.end(), ':', '-');
  return ProfileSteps(c.name, file, kProfiled, [&]() -> absl::Status {
    for (int i = 0; i < kProfiled; ++i) PPFT_RETURN_IF_ERROR(one(steps + kWarmUp + i));
    return absl::OkStatus();
  });
}

absl::Status Main(const std::vector<std::string>& arguments) {
  const char* plugin = std::getenv("PPFT_CUDA_PLUGIN");
  PPFT_ASSIGN_OR_RETURN(CudaRuntime * gpu, LoadCudaPlugin(plugin != nullptr ? plugin : ""));
  std::string reason;
  if (gpu->Devices(&reason).empty()) return absl::UnavailableError(absl::StrCat("no GPU: ", reason));
  gpu->Use(0);
  Settings settings;
  std::vector<std::string> names;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--steps" && i + 1 < arguments.size()) {
      settings.steps = std::max(1, std::atoi(arguments[++i].c_str()));
    } else if (arguments[i] == "--no-graphs") {
      settings.capture = false;
    } else if (arguments[i] == "--profile" && i + 1 < arguments.size()) {
      settings.profile = arguments[++i];
    } else if (arguments[i] == "--checkpointing" && i + 1 < arguments.size()) {
      const std::string& kept = arguments[++i];
      settings.checkpointing = kept == "full"        ? model::ActivationCheckpointing::kFull
                               : kept == "selective" ? model::ActivationCheckpointing::kSelective
                                                     : model::ActivationCheckpointing::kNone;
    } else if (arguments[i] == "--path" && i + 1 < arguments.size()) {
      // Deterministic mode takes flash attention.
      at::globalContext().setDeterministicAlgorithms(arguments[++i] == "flash", false);
      at::globalContext().setDeterministicFillUninitializedMemory(false);
    } else {
      names.push_back(arguments[i]);
    }
  }
  if (names.empty()) names = {"1b:8x2048", "1b:1x512"};
  for (const std::string& name : names) {
    PPFT_ASSIGN_OR_RETURN(const Case c, ParseCase(name));
    PPFT_RETURN_IF_ERROR(RunCase(*gpu, c, settings));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace ppft::trainer

int main(int argc, char** argv) {
  const absl::Status status = ppft::trainer::Main(std::vector<std::string>(argv + 1, argv + argc));
  if (!status.ok()) std::cerr << status << "\n";
  return status.ok() ? 0 : 1;
}
