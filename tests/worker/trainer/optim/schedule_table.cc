// Prints factors of a schedule for the comparison with transformers: schedule_table NAME WARMUP TOTAL MIN_LR_RATIO DECAY_STEPS -> one factor a line,
// for the steps 1 .. TOTAL + 1.
#include <cstdio>
#include <cstdlib>

#include "worker/trainer/optim/schedule.h"

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: schedule_table NAME WARMUP TOTAL MIN_LR_RATIO DECAY_STEPS\n");
    return 2;
  }
  ppft::trainer::LearningRateSchedule schedule;
  schedule.name = argv[1];
  schedule.warmup_steps = std::atoll(argv[2]);
  schedule.total_steps = std::atoll(argv[3]);
  schedule.min_lr_ratio = std::atof(argv[4]);
  schedule.decay_steps = std::atoll(argv[5]);
  if (!ppft::trainer::CheckSchedule(schedule).ok()) return 1;
  for (int64_t step = 1; step <= schedule.total_steps + 1; ++step) std::printf("%.17g\n", ppft::trainer::LearningRateFactor(schedule, step));
  return 0;
}
