#include "coordinator/artifacts/trainer_state.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

namespace ppft::coordinator {
namespace {

using nlohmann::json;

json LogRow(const v1::MetricRow& row) {
  json out = {{"step", row.step()}, {"epoch", row.epoch()}};
  if (row.has_eval_loss()) out["eval_loss"] = row.eval_loss();
  if (row.has_loss()) out["loss"] = row.loss();
  if (row.has_learning_rate()) out["learning_rate"] = row.learning_rate();
  if (row.has_grad_norm()) out["grad_norm"] = row.grad_norm();
  return out;
}

// A user's text inside a Markdown table or code span: one line, no characters that end them.
std::string Inline(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == '`' || c == '|') c = ' ';
  }
  return text.substr(0, 200);
}

std::string Row(absl::string_view name, absl::string_view value) { return absl::StrCat("| ", name, " | ", value, " |\n"); }

// JSON writes the shortest text that reads back to the same number.
std::string Number(double value) { return json(value).dump(); }

// As in adapter_config.json.
std::string WholeIfWhole(double value) {
  return value == std::floor(value) && std::abs(value) < 1e15 ? absl::StrCat(static_cast<int64_t>(value)) : Number(value);
}

std::string Parameters(const v1::JobSpec& spec) {
  std::vector<std::string> sources;
  for (const v1::DatasetSpec& dataset : spec.data().datasets()) {
    // The file's name alone: a card is published, and folders of somebody's machine do not belong into it.
    const std::string& source = dataset.source().empty() ? dataset.path() : dataset.source();
    sources.push_back(absl::StrCat("`", Inline(source.substr(source.rfind('/') + 1)), "` (", dataset.type(), ")"));
  }
  const v1::TrainingSpec& t = spec.training();
  std::string out = "| parameter | value |\n|---|---|\n";
  absl::StrAppend(&out, Row("data", absl::StrJoin(sources, ", ")), Row("r", absl::StrCat(spec.adapter().r())),
                  Row("lora_alpha", WholeIfWhole(spec.adapter().lora_alpha())), Row("lora_dropout", Number(spec.adapter().lora_dropout())),
                  Row("use_rslora", spec.adapter().use_rslora() ? "true" : "false"),
                  Row("target_modules", absl::StrJoin(spec.adapter().target_modules(), ", ")), Row("sequence_len", absl::StrCat(spec.data().sequence_len())),
                  Row("sample_packing", spec.data().sample_packing() ? "true" : "false"), Row("learning_rate", Number(t.learning_rate())),
                  Row("lr_scheduler", t.lr_scheduler()), Row("micro_batch_size", absl::StrCat(t.micro_batch_size())),
                  Row("gradient_accumulation_steps", absl::StrCat(t.gradient_accumulation_steps())), Row("optimizer", t.optimizer()),
                  Row("weight_decay", Number(t.weight_decay())), Row("max_grad_norm", Number(t.max_grad_norm())), Row("seed", absl::StrCat(spec.seed())));
  return out;
}

std::string Results(const TrainingSummary& summary) {
  const v1::MetricRow *last_loss = nullptr, *first_eval = nullptr, *last_eval = nullptr;
  for (const v1::MetricRow& row : summary.rows) {
    if (row.has_loss()) last_loss = &row;
    if (row.has_eval_loss()) {
      if (first_eval == nullptr) first_eval = &row;
      last_eval = &row;
    }
  }
  std::string out = "| metric | value |\n|---|---|\n";
  absl::StrAppend(&out, Row("optimizer steps", absl::StrCat(summary.step)), Row("epochs", absl::StrFormat("%.2f", summary.epoch)));
  if (last_loss != nullptr) absl::StrAppend(&out, Row(absl::StrCat("training loss at step ", last_loss->step()), absl::StrFormat("%.4f", last_loss->loss())));
  if (first_eval != nullptr)
    absl::StrAppend(&out, Row(absl::StrCat("evaluation loss at step ", first_eval->step()), absl::StrFormat("%.4f", first_eval->eval_loss())));
  if (last_eval != first_eval)
    absl::StrAppend(&out, Row(absl::StrCat("evaluation loss at step ", last_eval->step()), absl::StrFormat("%.4f", last_eval->eval_loss())));
  if (summary.best_metric)
    absl::StrAppend(&out, Row(absl::StrCat("best evaluation loss, step ", summary.best_step), absl::StrFormat("%.4f", *summary.best_metric)));
  absl::StrAppend(&out, Row("weights of step", absl::StrCat(summary.weights_step)));
  return out;
}

}  // namespace

std::string TrainerStateText(const TrainingSummary& summary) {
  json history = json::array();
  for (const v1::MetricRow& row : summary.rows) history.push_back(LogRow(row));
  const v1::JobSpec& spec = summary.spec;
  json state = {{"best_global_step", nullptr},
                {"best_metric", nullptr},
                {"best_model_checkpoint", nullptr},
                {"epoch", summary.epoch},
                {"eval_steps", spec.evaluation().eval_steps()},
                {"global_step", summary.step},
                {"is_hyper_param_search", false},
                {"is_local_process_zero", true},
                {"is_world_process_zero", true},
                {"log_history", std::move(history)},
                {"logging_steps", spec.training().logging_steps()},
                {"max_steps", summary.max_steps},
                {"num_train_epochs", spec.training().has_num_epochs() ? static_cast<int64_t>(std::ceil(spec.training().num_epochs()))
                                                                      : std::max<int64_t>(1, static_cast<int64_t>(std::ceil(summary.epoch)))},
                {"save_steps", spec.checkpoint().save_steps()},
                {"train_batch_size", spec.training().micro_batch_size()}};
  if (summary.best_metric) {
    state["best_metric"] = *summary.best_metric;
    state["best_global_step"] = summary.best_step;
  }
  return state.dump(2) + "\n";
}

std::string ModelCardText(const TrainingSummary& summary, const std::string& base_model, const std::string& type) {
  const bool adapter = type == "adapter";
  std::string out = absl::StrCat("---\nbase_model: ", json(base_model).dump(), "\nlibrary_name: ", adapter ? "peft" : "transformers",
                                 "\npipeline_tag: text-generation\ntags:\n- lora\n- ppft\n---\n\n");
  absl::StrAppend(&out, "# ", Inline(summary.spec.name()), "\n\n",
                  adapter ? "A LoRA adapter for the base model `" : "A model with its LoRA adapter merged in, from the base model `", Inline(base_model),
                  "`, trained with ppft.\n\n");
  absl::StrAppend(&out, "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n");
  if (adapter) {
    absl::StrAppend(&out,
                    "from peft import PeftModel\n\nbase = AutoModelForCausalLM.from_pretrained(\"PATH_OF_THE_BASE_MODEL\")\nmodel = "
                    "PeftModel.from_pretrained(base, \"PATH_OF_THIS_FOLDER\")\n");
  } else {
    absl::StrAppend(&out, "\nmodel = AutoModelForCausalLM.from_pretrained(\"PATH_OF_THIS_FOLDER\")\n");
  }
  absl::StrAppend(&out, "tokenizer = AutoTokenizer.from_pretrained(\"PATH_OF_THIS_FOLDER\")\n```\n\n## Results\n\n", Results(summary), "\n## Training\n\n",
                  Parameters(summary.spec));
  return out;
}

}  // namespace ppft::coordinator
