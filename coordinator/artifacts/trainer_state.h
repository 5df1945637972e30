// The text files of an artifact that say how it came to be: trainer_state.json as transformers writes it, and the model card. PURE: the same
// input gives the same bytes.
#pragma once

#include <string>
#include <vector>

#include "common/model/peft.h"
#include "ppft/v1/artifact.pb.h"
#include "ppft/v1/job.pb.h"

namespace ppft::coordinator {

struct TrainingSummary {
  v1::JobSpec spec;
  int64_t step = 0;       // optimizer steps done
  int64_t max_steps = 0;  // of the whole job
  double epoch = 0;
  std::optional<double> best_metric;
  int64_t best_step = 0;            // 0 = none
  int64_t weights_step = 0;         // whose weights the artifact holds
  std::vector<v1::MetricRow> rows;  // by step, training row before evaluation row
};

// Keys sorted as transformers sorts them; numbers in the shortest form that reads back to the same double.
std::string TrainerStateText(const TrainingSummary& summary);

// README.md of an artifact; type is adapter or merged.
std::string ModelCardText(const TrainingSummary& summary, const std::string& base_model, const std::string& type);

}  // namespace ppft::coordinator
