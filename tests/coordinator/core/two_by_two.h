// A plan for tests.
#pragma once

#include "absl/strings/str_cat.h"
#include "ppft/v1/plan.pb.h"

namespace ppft::coordinator {

// Two replicas of two stages over five layers; the ranks are listed out of order on purpose.
inline v1::Plan TwoByTwo() {
  v1::Plan plan;
  const int layers[2][2] = {{0, 3}, {3, 2}};
  for (int stage = 0; stage < 2; ++stage) {
    v1::StagePlan& held = *plan.add_stages();
    held.set_stage(stage);
    held.set_first_layer(layers[stage][0]);
    held.set_num_layers(layers[stage][1]);
    held.set_has_embedding(stage == 0);
    held.set_has_head(stage == 1);
  }
  for (const int rank : {3, 1, 0, 2}) {
    v1::RankPlan& held = *plan.add_ranks();
    held.set_rank(rank);
    held.set_replica(rank / 2);
    held.set_pipeline_rank(rank % 2);
    held.set_worker(absl::StrCat("worker-", rank));
    held.set_device("cpu:0");
    held.add_stages(rank % 2);
  }
  return plan;
}

}  // namespace ppft::coordinator
