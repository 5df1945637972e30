// Runs StageModels on a model folder as a JSON request says and writes what they computed to a safetensors file, for tests against other implementations.
//
//   stage_model_tool request.json
//
// Request: model (folder), stages [[first, layers], …], compute, r, scale, dropout, seed, targets, adapter (file, optional), chunk,
// microbatches [{cu_seqlens, ids, target_rows, target_ids}], loss_weight, training, and what is wanted: logits, gradients (bool), greedy (tokens after
// microbatch 0), merged (list of files, one per stage), merge_dtype, adapter_out (file), bench_steps; out (file).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "common/base/files.h"
#include "common/base/status.h"
#include "common/model/config.h"
#include "common/model/safetensors.h"
#include "worker/trainer/checkpoint/adapter_file.h"
#include "worker/trainer/checkpoint/merged_file.h"
#include "worker/trainer/checkpoint/tensor_file.h"
#include "worker/trainer/model/stage_model.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

using nlohmann::json;

struct Chain {
  std::vector<std::unique_ptr<StageModel>> stages;

  std::vector<StageModel*> pointers() const {
    std::vector<StageModel*> result;
    for (const auto& stage : stages) result.push_back(stage.get());
    return result;
  }
  absl::StatusOr<at::Tensor> Logits(const MicrobatchInput& input, const std::vector<int64_t>& rows) {
    at::Tensor hidden;
    double unused = 0;
    for (size_t s = 0; s + 1 < stages.size(); ++s) {
      PPFT_ASSIGN_OR_RETURN(hidden, stages[s]->Forward(input, hidden, false, &unused));
    }
    return stages.back()->Logits(input, hidden, rows);
  }
  // All forwards, then all backwards in order, as a pipeline would hold several micro-batches.
  absl::Status Step(const std::vector<MicrobatchInput>& inputs, double* loss) {
    std::vector<at::Tensor> gradients(inputs.size());
    for (const MicrobatchInput& input : inputs) {
      at::Tensor hidden;
      for (const auto& stage : stages) {
        PPFT_ASSIGN_OR_RETURN(hidden, stage->Forward(input, hidden, true, loss));
      }
    }
    for (const MicrobatchInput& input : inputs) {
      at::Tensor gradient;
      for (size_t s = stages.size(); s-- > 0;) {
        PPFT_ASSIGN_OR_RETURN(gradient, stages[s]->Backward(input, gradient));
      }
    }
    return absl::OkStatus();
  }
};

at::Tensor LongTensor(const json& values) {
  const std::vector<int64_t> v = values.get<std::vector<int64_t>>();
  return at::tensor(v, at::kLong);
}

std::vector<int64_t> AllRows(int64_t count) {
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = i;
  return rows;
}

// model.safetensors, or the shards of model.safetensors.index.json.
absl::StatusOr<TensorSource> SourceOfFolder(const std::string& folder) {
  const std::string index = JoinPath(folder, "model.safetensors.index.json");
  if (!PathExists(index)) return SourceOfFiles({JoinPath(folder, "model.safetensors")});
  PPFT_ASSIGN_OR_RETURN(const std::string json, ReadFile(index));
  PPFT_ASSIGN_OR_RETURN(const auto file_of_tensor, model::ParseSafetensorsIndex(json, index));
  std::set<std::string> names;
  for (const auto& [tensor, file] : file_of_tensor) names.insert(file);
  std::vector<std::string> paths;
  for (const std::string& name : names) paths.push_back(JoinPath(folder, name));
  return SourceOfFiles(paths);
}

// Sets every master of the stage from `adapter`; tensors of other stages in it are ignored.
absl::Status LoadAdapter(const TensorFile& adapter, StageModel& stage) {
  return CatchTorch("adapter", [&]() -> absl::Status {
    std::vector<at::Tensor> values;
    for (const Parameter& parameter : stage.parameters()) {
      PPFT_ASSIGN_OR_RETURN(const at::Tensor value, adapter.Read(parameter.name));
      if (value.sizes() != parameter.master.sizes()) {
        return absl::InvalidArgumentError(absl::StrCat("adapter tensor ", parameter.name, " has the shape ", model::ShapeText(value.sizes().vec()),
                                                       ", but this job needs ", model::ShapeText(parameter.master.sizes().vec())));
      }
      if (!at::isfinite(value).all().item<bool>()) {
        return absl::InvalidArgumentError(absl::StrCat("adapter tensor ", parameter.name, " holds numbers that are not finite"));
      }
      values.push_back(value);
    }
    for (size_t i = 0; i < values.size(); ++i) stage.parameters()[i].master.copy_(values[i]);
    stage.AdapterChanged();
    return absl::OkStatus();
  });
}

absl::Status Run(const std::string& path) {
  PPFT_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const json request = json::parse(text);
  at::set_num_threads(request.value("threads", 2));
  const std::string folder = request.at("model");
  PPFT_ASSIGN_OR_RETURN(const std::string config_text, ReadFile(JoinPath(folder, "config.json")));
  PPFT_ASSIGN_OR_RETURN(const model::ModelConfig config, model::ParseModelConfig(config_text, "config.json"));
  PPFT_ASSIGN_OR_RETURN(const TensorSource source, SourceOfFolder(folder));

  Chain chain;
  const json stages = request.contains("stages") ? request.at("stages") : json::array({{0, config.num_layers}});
  for (size_t s = 0; s < stages.size(); ++s) {
    StageOptions options;
    options.stage = static_cast<int>(s);
    options.first_layer = stages[s][0];
    options.num_layers = stages[s][1];
    options.has_embedding = s == 0;
    options.has_head = s + 1 == stages.size();
    PPFT_ASSIGN_OR_RETURN(options.compute, DtypeOfWord(request.value("compute", "F32")));
    options.lora.r = request.value("r", 16);
    options.lora.scale = request.value("scale", 2.0);
    options.lora.dropout = request.value("dropout", 0.0);
    options.lora.seed = request.value("seed", 42);
    options.lora.target_modules = request.value("targets", std::vector<std::string>{});
    options.head_chunk_rows = request.value("chunk", 256);
    PPFT_ASSIGN_OR_RETURN(auto stage, StageModel::Create(config, options, source));
    if (request.contains("adapter")) {
      PPFT_ASSIGN_OR_RETURN(const TensorFile adapter, TensorFile::Open(request.at("adapter")));
      PPFT_RETURN_IF_ERROR(LoadAdapter(adapter, *stage));
    }
    chain.stages.push_back(std::move(stage));
  }

  std::vector<MicrobatchInput> inputs;
  for (const json& m : request.at("microbatches")) {
    MicrobatchInput input;
    input.step = request.value("step", 1);
    input.microbatch = static_cast<int>(inputs.size());
    input.cu_seqlens = m.at("cu_seqlens").get<std::vector<int32_t>>();
    input.ids = LongTensor(m.at("ids"));
    input.target_rows = LongTensor(m.value("target_rows", json::array()));
    input.target_ids = LongTensor(m.value("target_ids", json::array()));
    input.loss_weight = request.value("loss_weight", 1.0);
    input.training = request.value("training", true);
    inputs.push_back(std::move(input));
  }

  std::vector<NamedTensor> out;
  if (request.value("logits", false)) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      PPFT_ASSIGN_OR_RETURN(const at::Tensor logits, chain.Logits(inputs[i], AllRows(inputs[i].cu_seqlens.back())));
      out.push_back({absl::StrCat("logits.", i), logits});
    }
  }
  if (request.value("gradients", false)) {
    double loss = 0;
    PPFT_RETURN_IF_ERROR(chain.Step(inputs, &loss));
    for (const auto& stage : chain.stages) {
      if (stage->activation_bytes() != 0) return absl::InternalError("activations are left after the step");
      for (const Parameter& p : stage->parameters()) out.push_back({absl::StrCat("gradient.", p.name), p.gradient.clone()});
    }
    out.push_back({"loss", at::tensor({loss}, at::kDouble)});
  }
  if (const int steps = request.value("bench_steps", 0); steps > 0) {
    std::vector<double> seconds;
    for (int i = 0; i < steps; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      double loss = 0;
      for (const MicrobatchInput& input : inputs) PPFT_RETURN_IF_ERROR(chain.Step({input}, &loss));
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    out.push_back({"seconds", at::tensor(seconds, at::kDouble)});
  }
  if (const int64_t tokens = request.value("greedy", 0); tokens > 0) {
    std::vector<int64_t> ids = request.at("microbatches")[0].at("ids").get<std::vector<int64_t>>();
    for (int64_t i = 0; i < tokens; ++i) {
      MicrobatchInput input;
      input.ids = at::tensor(ids, at::kLong);
      input.cu_seqlens = {0, static_cast<int32_t>(ids.size())};
      input.training = false;
      PPFT_ASSIGN_OR_RETURN(const at::Tensor logits, chain.Logits(input, {static_cast<int64_t>(ids.size()) - 1}));
      ids.push_back(logits.argmax().item<int64_t>());
    }
    out.push_back({"greedy", at::tensor(ids, at::kLong)});
  }
  if (request.contains("merged")) {
    PPFT_ASSIGN_OR_RETURN(const at::ScalarType dtype, DtypeOfWord(request.value("merge_dtype", "F32")));
    for (size_t s = 0; s < chain.stages.size(); ++s) {
      PPFT_RETURN_IF_ERROR(WriteMergedFile(request.at("merged")[s], {chain.stages[s].get()}, dtype, [] {}).status());
    }
  }
  if (request.contains("adapter_out")) PPFT_RETURN_IF_ERROR(WriteAdapterFile(request.at("adapter_out"), chain.pointers()).status());
  return WriteTensorFile(request.at("out"), out, {}).status();
}

}  // namespace
}  // namespace ppft::trainer

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: stage_model_tool request.json\n";
    return 2;
  }
  const absl::Status status = ppft::trainer::Run(argv[1]);
  if (!status.ok()) std::cerr << status << "\n";
  return status.ok() ? 0 : 1;
}
