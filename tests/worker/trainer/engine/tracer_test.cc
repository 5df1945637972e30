// What is recorded of a rank's steps, by the host's clock and by a device that is one number here.
#include "worker/trainer/engine/tracer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace ppft::trainer {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

// Reaches a mark only when the test says so.
class FakeTimer : public DeviceTimer {
 public:
  struct State {
    std::vector<int64_t> marks;  // when each is reached
    size_t reached = 0;          // how many were
    size_t collected = 0;
    int64_t now = 0;
    int waits = 0;
  };
  explicit FakeTimer(State* state) : state_(state) {}

  void Mark() override { state_->marks.push_back(state_->now); }
  std::vector<int64_t> Collect() override {
    const std::vector<int64_t> out(state_->marks.begin() + static_cast<std::ptrdiff_t>(state_->collected),
                                   state_->marks.begin() + static_cast<std::ptrdiff_t>(state_->reached));
    state_->collected = state_->reached;
    return out;
  }
  void Wait() override {
    ++state_->waits;
    state_->reached = state_->marks.size();
  }

 private:
  State* const state_;
};

class FakeReporter : public Reporter {
 public:
  void Listening(const std::string&) override {}
  void Ready() override {}
  void Step(const StepReport&) override {}
  void Eval(const EvalReport&) override {}
  void Checkpoint(const CheckpointWritten&) override {}
  void Stats(const StageStats&) override {}
  void Finished(const TrainingState&, const std::string&) override {}
  void Exported(const ExportWritten&) override {}
  void Log(Severity, const std::string&) override {}
  void Failed(const FailureReport&) override {}
  void Trace(const RankTrace& trace) override { traces.push_back(trace); }

  std::vector<RankTrace> traces;
};

std::vector<std::string> Names(const std::vector<TraceSpan>& spans) {
  std::vector<std::string> names;
  for (const TraceSpan& span : spans) names.push_back(absl::StrCat(span.step, ":", static_cast<int>(span.row), ":", span.name));
  return names;
}

const pipeline::Action kForward{1, pipeline::Op::kForward, 2};
const pipeline::Action kReceive{1, pipeline::Op::kRecvForward, 2};

void OneStep(Activity* activity, int64_t step, FakeTimer::State* device = nullptr) {
  const auto work = [&](int64_t nanos) {
    if (device != nullptr) device->now += nanos;
  };
  activity->SetStep(step);
  activity->Enter(Section::kReceive, &kReceive);
  work(10);
  activity->Enter(Section::kForward, &kForward);
  work(200);
  activity->Enter(Section::kReduce);
  work(3000);
  activity->Enter(Section::kOptimizer);
  work(40000);
  activity->Rest();
  work(500000);
}

TEST(ActivityTest, NothingIsRecordedUntilATraceIsStarted) {
  Activity activity(nullptr);
  OneStep(&activity, 1);
  activity.StartTrace();
  OneStep(&activity, 2);
  const std::vector<TraceSpan> spans = activity.StopTrace();
  EXPECT_THAT(Names(spans), ElementsAre("2:2:1RECV_F2", "2:0:1F2", "2:3:reduce", "2:4:optimizer"));
  EXPECT_EQ(spans[1].stage, 1);
  EXPECT_EQ(spans[1].microbatch, 2);
  EXPECT_EQ(spans[3].stage, -1);
  int64_t end = 0;
  for (const TraceSpan& span : spans) {
    EXPECT_GE(span.begin_unix_nanos, end) << "spans of one rank overlap";
    end = span.begin_unix_nanos + span.duration_nanos;
  }
  OneStep(&activity, 3);
  EXPECT_THAT(activity.StopTrace(), IsEmpty());
  EXPECT_GT(activity.seconds(Busy::kForward), 0);
}

TEST(ActivityTest, ADevicesSectionsLastAsLongAsItsWork) {
  FakeTimer::State device;
  Activity activity(nullptr);
  activity.UseDevice(std::make_unique<FakeTimer>(&device));
  activity.Enter(Section::kStarting);
  OneStep(&activity, 1, &device);
  activity.Collect();
  EXPECT_EQ(activity.seconds(Busy::kForward), 0) << "the device has not come to it";
  EXPECT_EQ(device.waits, 0);
  device.reached = device.marks.size();
  activity.Collect();
  EXPECT_NEAR(activity.seconds(Busy::kForward), 200e-9, 1e-15);
  EXPECT_NEAR(activity.seconds(Busy::kReceive), 3010e-9, 1e-15);
  EXPECT_NEAR(activity.seconds(Busy::kOptimizer), 40000e-9, 1e-15);

  activity.StartTrace();
  const int64_t before = UnixNanos();
  OneStep(&activity, 2, &device);
  EXPECT_EQ(device.waits, 1) << "a traced step waits for nothing";
  const std::vector<TraceSpan> spans = activity.StopTrace();
  EXPECT_THAT(Names(spans), ElementsAre("2:2:1RECV_F2", "2:0:1F2", "2:3:reduce", "2:4:optimizer"));
  EXPECT_EQ(spans[1].begin_unix_nanos - spans[0].begin_unix_nanos, 10);
  EXPECT_EQ(spans[1].duration_nanos, 200);
  EXPECT_EQ(spans[3].duration_nanos, 40000);
  EXPECT_LE(spans[0].begin_unix_nanos, before + 500000) << "by the host's clock";
}

TEST(ActivityTest, EvaluationsAreToldApart) {
  Activity activity(nullptr);
  activity.StartTrace();
  activity.SetEvaluation(true);
  activity.Enter(Section::kForward, &kForward);
  activity.Rest();
  activity.SetEvaluation(false);
  activity.Enter(Section::kForward, &kForward);
  const std::vector<TraceSpan> spans = activity.StopTrace();
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_TRUE(spans[0].evaluation);
  EXPECT_FALSE(spans[1].evaluation);
}

class TracerTest : public ::testing::Test {
 protected:
  // What a rank does from `first` to `last`, with the same orders on another rank.
  void Train(int64_t first, int64_t last, const TraceOrder& other) {
    for (int64_t step = first; step <= last; ++step) {
      tracer_.BeginStep(step);
      OneStep(&activity_, step);
      const int64_t mine = tracer_.Offer();
      tracer_.Agree({mine, other.id});
    }
  }

  TraceOrders orders_;
  FakeReporter reporter_;
  Activity activity_{nullptr};
  Tracer tracer_{&orders_, &activity_, &reporter_};
};

TEST_F(TracerTest, AllRanksMustHaveTheOrderAndThenTraceTheNextSteps) {
  Train(1, 3, {});
  orders_.Set({7, 2});
  Train(4, 5, {});  // the other rank does not know it yet
  EXPECT_FALSE(activity_.tracing());
  Train(6, 6, {7, 2});
  Train(7, 9, {});
  ASSERT_EQ(reporter_.traces.size(), 1u);
  EXPECT_EQ(reporter_.traces[0].id, 7);
  EXPECT_EQ(reporter_.traces[0].first_step, 7);
  EXPECT_EQ(reporter_.traces[0].last_step, 8);
  EXPECT_EQ(reporter_.traces[0].spans.size(), 8u);
  EXPECT_TRUE(reporter_.traces[0].last);
  EXPECT_FALSE(reporter_.traces[0].device_times);
  Train(10, 12, {7, 2});
  EXPECT_EQ(reporter_.traces.size(), 1u) << "an order is carried out once";
  orders_.Set({});
  Train(13, 14, {});
  tracer_.Finish(14);
  EXPECT_EQ(reporter_.traces.size(), 1u);
}

TEST_F(TracerTest, AnOrderFromBeforeTheFirstStepTracesThat) {
  orders_.Set({1, 1});
  tracer_.Agree({tracer_.Offer(), 1});
  Train(1, 2, {});
  ASSERT_EQ(reporter_.traces.size(), 1u);
  EXPECT_EQ(reporter_.traces[0].first_step, 1);
}

TEST_F(TracerTest, TheEndOfTrainingEndsTheTrace) {
  orders_.Set({1, 100});
  Train(1, 3, {1, 100});
  tracer_.Finish(3);
  ASSERT_EQ(reporter_.traces.size(), 1u);
  EXPECT_EQ(reporter_.traces[0].first_step, 2);
  EXPECT_EQ(reporter_.traces[0].last_step, 3);
}

TEST_F(TracerTest, AnOrderThatComesTooLateIsAnswered) {
  orders_.Set({5, 3});
  tracer_.Finish(9);
  ASSERT_EQ(reporter_.traces.size(), 1u);
  EXPECT_EQ(reporter_.traces[0].id, 5);
  EXPECT_EQ(reporter_.traces[0].first_step, 0);
  EXPECT_TRUE(reporter_.traces[0].last);
}

TEST_F(TracerTest, LongTracesComeInParts) {
  orders_.Set({1, 20000});
  tracer_.Agree({tracer_.Offer()});
  Train(1, 10002, {});
  tracer_.Finish(10002);
  ASSERT_EQ(reporter_.traces.size(), 3u);
  EXPECT_EQ(reporter_.traces[0].spans.size() + reporter_.traces[1].spans.size() + reporter_.traces[2].spans.size(), 4u * 10002);
  EXPECT_FALSE(reporter_.traces[0].last);
  EXPECT_FALSE(reporter_.traces[1].last);
  EXPECT_TRUE(reporter_.traces[2].last);
  EXPECT_EQ(Names(reporter_.traces[2].spans).back(), "10002:4:optimizer");
}

}  // namespace
}  // namespace ppft::trainer
