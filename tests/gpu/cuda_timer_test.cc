// Marks in the device's stream, and the sections of a rank that they time.
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/gpu/gpu.h"
#include "worker/trainer/engine/activity.h"

namespace ppft::trainer {
namespace {

void Work(int products) {
  static const at::Tensor* const matrix = new at::Tensor(at::randn({2048, 2048}, OnGpu(at::kFloat)));
  for (int i = 0; i < products; ++i) at::matmul(*matrix, *matrix);
}

TEST(CudaTimerTest, MarksComeInOrderOnceAndOnlyWhenReached) {
  const std::unique_ptr<DeviceTimer> timer = Gpu().MakeTimer();
  EXPECT_TRUE(timer->Collect().empty());
  Work(3);
  Gpu().Synchronize(0);
  std::vector<int64_t> marks;
  for (int round = 0; round < 100; ++round) {  // the events are used again
    timer->Mark();
    Work(1);
    timer->Mark();
    Work(50);
    timer->Mark();
    if (round % 10 == 9) {
      const std::vector<int64_t> some = timer->Collect();
      marks.insert(marks.end(), some.begin(), some.end());
    }
  }
  timer->Wait();
  const std::vector<int64_t> rest = timer->Collect();
  marks.insert(marks.end(), rest.begin(), rest.end());
  ASSERT_EQ(marks.size(), 300u);
  EXPECT_EQ(marks[0], 0);
  EXPECT_TRUE(std::is_sorted(marks.begin(), marks.end()));
  EXPECT_TRUE(timer->Collect().empty());
  int64_t short_work = 0, long_work = 0;
  for (size_t i = 0; i < marks.size(); i += 3) {
    short_work += marks[i + 1] - marks[i];
    long_work += marks[i + 2] - marks[i + 1];
  }
  EXPECT_GT(short_work, 0);
  EXPECT_GT(long_work, 5 * short_work) << "50 products take longer than one";
}

TEST(CudaTimerTest, SectionsLastAsLongAsTheDeviceWorks) {
  Activity activity(nullptr);
  activity.UseDevice(Gpu().MakeTimer());
  Work(3);
  activity.StartTrace();
  for (int64_t step = 1; step <= 3; ++step) {
    activity.SetStep(step);
    activity.Enter(Section::kForward);
    Work(10);
    activity.Enter(Section::kBackward);
    Work(200);
    activity.Rest();
    Gpu().Synchronize(0);  // the wait of a step
    activity.Collect();
    EXPECT_GT(activity.seconds(Busy::kBackward), activity.seconds(Busy::kForward));
  }
  const std::vector<TraceSpan> spans = activity.StopTrace();
  ASSERT_EQ(spans.size(), 6u);
  for (size_t i = 0; i < spans.size(); ++i) {
    EXPECT_EQ(spans[i].step, static_cast<int64_t>(i / 2 + 1));
    EXPECT_GT(spans[i].duration_nanos, 0);
    if (i > 0) {
      EXPECT_GE(spans[i].begin_unix_nanos, spans[i - 1].begin_unix_nanos + spans[i - 1].duration_nanos);
    }
  }
}

}  // namespace
}  // namespace ppft::trainer
