#include "coordinator/core/queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>

#include "absl/strings/str_cat.h"

namespace ppft::coordinator {
namespace {

using testing::ElementsAre;

std::vector<OfferedDevice> Devices(int first, int count, const std::string& kind = "cpu") {
  std::vector<OfferedDevice> devices;
  for (int i = first; i < first + count; ++i) {
    OfferedDevice offered{"w", {}};
    offered.device.set_id(absl::StrCat(kind, ":", i));
    offered.device.set_kind(kind);
    devices.push_back(offered);
  }
  return devices;
}

// A planner that takes as many devices as parallel.pipeline_parallel_size says.
PlanAttempt TakeAsAsked(const v1::JobRecord& record, const std::vector<OfferedDevice>& devices, const std::string&) {
  PlanAttempt attempt;
  const int size = record.job().spec().parallel().pipeline_parallel_size();
  attempt.devices_needed = size;
  if (static_cast<int>(devices.size()) < size) return attempt;
  attempt.plan.emplace();
  for (int i = 0; i < size; ++i) {
    v1::RankPlan& rank = *attempt.plan->add_ranks();
    rank.set_worker(devices[i].worker);
    rank.set_device(devices[i].device.id());
  }
  return attempt;
}

struct Asked {
  const char* id;
  int priority;
  int devices;
  int64_t not_before = 0;
};

struct Case {
  const char* sentence;
  int total;
  int free;
  std::vector<Asked> jobs;  // in the order of submission
  std::vector<std::string> started;
  std::map<std::string, std::string> reasons;  // id -> part of the message of those that wait
};

class Queue : public testing::TestWithParam<Case> {};

TEST_P(Queue, Decides) {
  const Case& c = GetParam();
  std::vector<v1::JobRecord> records(c.jobs.size());
  std::vector<const v1::JobRecord*> queued;
  for (size_t i = 0; i < c.jobs.size(); ++i) {
    v1::JobRecord& record = records[i];
    record.mutable_job()->set_id(c.jobs[i].id);
    record.mutable_job()->mutable_spec()->set_priority(c.jobs[i].priority);
    record.mutable_job()->mutable_spec()->mutable_parallel()->set_pipeline_parallel_size(c.jobs[i].devices);
    record.mutable_retry()->set_not_before_unix_ms(c.jobs[i].not_before);
    record.set_submit_order(static_cast<int64_t>(i) + 1);
    queued.insert(queued.begin(), &record);  // the order given must not matter
  }
  std::vector<std::string> started;
  std::map<std::string, std::string> reasons;
  std::set<std::pair<std::string, std::string>> taken;
  int position = 0;
  for (const QueueDecision& decision : DecideQueue(queued, Devices(c.total - c.free, c.free), Devices(0, c.total), {}, TakeAsAsked, 1000)) {
    if (!decision.plan.has_value()) {
      reasons[decision.job_id] = absl::StrCat(decision.reason.code(), " ", decision.reason.message());
      EXPECT_EQ(decision.position, ++position);
      continue;
    }
    started.push_back(decision.job_id);
    for (const v1::RankPlan& rank : decision.plan->ranks()) EXPECT_TRUE(taken.insert({rank.worker(), rank.device()}).second) << "a device leased twice";
  }
  EXPECT_EQ(started, c.started) << c.sentence;
  EXPECT_EQ(reasons.size(), c.reasons.size()) << c.sentence;
  for (const auto& [id, part] : c.reasons) EXPECT_NE(reasons[id].find(part), std::string::npos) << c.sentence << ": " << id << ": " << reasons[id];
}

INSTANTIATE_TEST_SUITE_P(
    Cases, Queue,
    testing::Values(
        Case{"an empty cluster makes everybody wait for capacity", 0, 0, {{"a", 50, 1}}, {}, {{"a", "NO_CAPACITY needs 1 device, the cluster has 0"}}},
        Case{"jobs that fit start in the order of submission", 4, 4, {{"a", 50, 2}, {"b", 50, 1}, {"c", 50, 1}}, {"a", "b", "c"}, {}},
        Case{"a higher priority goes first", 2, 2, {{"a", 50, 2}, {"b", 90, 2}}, {"b"}, {{"a", "waits for 2 devices, 0 free; position 1"}}},
        Case{"the head that waits is not overtaken",
             4,
             1,
             {{"a", 50, 2}, {"b", 50, 1}},
             {},
             {{"a", "waits for 2 devices, 1 free; position 1"}, {"b", "behind a"}}},
        Case{
            "a job that the cluster can never hold lets others pass", 2, 2, {{"a", 50, 8}, {"b", 50, 2}}, {"b"}, {{"a", "needs 8 devices, the cluster has 2"}}},
        Case{"a job in its backoff lets others pass", 2, 2, {{"a", 50, 2, 2000}, {"b", 50, 2}}, {"b"}, {{"a", "BACKOFF"}}},
        Case{"a job whose backoff is over starts", 2, 2, {{"a", 50, 2, 999}}, {"a"}, {}}));

// Workers a, b and c with one device each; b has failed the job twice.
QueueDecision WithExcluded(const std::vector<std::string>& free, int devices) {
  const auto offer = [](const std::vector<std::string>& workers) {
    std::vector<OfferedDevice> out;
    for (const std::string& worker : workers) {
      out.push_back(OfferedDevice{worker, {}});
      out.back().device.set_id("cpu:0");
      out.back().device.set_kind("cpu");
    }
    return out;
  };
  v1::JobRecord record;
  record.mutable_job()->set_id("job-a");
  record.mutable_job()->mutable_spec()->mutable_parallel()->set_pipeline_parallel_size(devices);
  (*record.mutable_retry()->mutable_failures_by_worker())["b"] = 2;
  (*record.mutable_retry()->mutable_failures_by_worker())["c"] = 1;
  return DecideQueue({&record}, offer(free), offer({"a", "b", "c"}), {}, TakeAsAsked, 1000).at(0);
}

TEST(ExcludedWorker, IsLeftOutWhileOthersCanTakeTheJob) {
  const QueueDecision started = WithExcluded({"a", "b", "c"}, 2);
  ASSERT_TRUE(started.plan.has_value());
  EXPECT_EQ(started.plan->ranks(0).worker(), "a");
  EXPECT_EQ(started.plan->ranks(1).worker(), "c");
  EXPECT_NE(started.reason.message().find("b failed this job twice and is left out"), std::string::npos) << started.reason.message();
  const QueueDecision waits = WithExcluded({"b", "c"}, 2);
  EXPECT_FALSE(waits.plan.has_value()) << "the free device of an excluded worker is none";
  EXPECT_EQ(waits.reason.code(), "QUEUED");
}

TEST(ExcludedWorker, IsUsedAgainWhenNoOtherCanTakeTheJob) {
  const QueueDecision started = WithExcluded({"a", "b", "c"}, 3);
  ASSERT_TRUE(started.plan.has_value());
  EXPECT_EQ(started.plan->ranks_size(), 3);
  EXPECT_NE(started.reason.message().find("b failed this job twice, but the other workers cannot take it"), std::string::npos) << started.reason.message();
  EXPECT_EQ(WithExcluded({"a", "c"}, 3).reason.code(), "QUEUED") << "it waits for the excluded one";
  EXPECT_EQ(WithExcluded({"a", "b", "c"}, 4).reason.code(), "NO_CAPACITY");
}

// Two GPUs and four CPU slots.
class Kinds : public testing::Test {
 protected:
  v1::JobRecord& Job(const std::string& id, int devices) {
    v1::JobRecord& record = *records_.emplace_back(std::make_unique<v1::JobRecord>());
    record.mutable_job()->set_id(id);
    record.mutable_job()->mutable_spec()->mutable_parallel()->set_pipeline_parallel_size(devices);
    record.set_submit_order(static_cast<int64_t>(records_.size()));
    return record;
  }
  // What is decided: "cuda:0 cuda:1" or "CODE message".
  std::vector<std::string> Decide(const std::vector<OfferedDevice>& free, const std::vector<OfferedDevice>& all, const std::vector<AwayGpus>& away = {}) {
    std::vector<const v1::JobRecord*> queued;
    for (const auto& record : records_) queued.push_back(record.get());
    std::vector<std::string> out;
    for (const QueueDecision& decision : DecideQueue(queued, free, all, away, TakeAsAsked, 0)) {
      std::string& text = out.emplace_back();
      if (!decision.plan.has_value()) text = absl::StrCat(decision.reason.code(), " ", decision.reason.message());
      for (int i = 0; decision.plan.has_value() && i < decision.plan->ranks_size(); ++i) {
        absl::StrAppend(&text, i > 0 ? " " : "", decision.plan->ranks(i).device());
      }
    }
    return out;
  }
  static std::vector<OfferedDevice> Both(std::vector<OfferedDevice> devices, const std::vector<OfferedDevice>& more) {
    devices.insert(devices.end(), more.begin(), more.end());
    return devices;
  }

  const std::vector<OfferedDevice> cpus_ = Devices(0, 4), gpus_ = Devices(0, 2, "cuda"), all_ = Both(cpus_, gpus_);
  std::vector<std::unique_ptr<v1::JobRecord>> records_;
};

TEST_F(Kinds, WhereThereAreGpusAJobWaitsForThemWhileCpusAreFree) {
  Job("a", 1), Job("b", 2), Job("c", 1);
  EXPECT_THAT(Decide(all_, all_),
              ElementsAre("cuda:0", "QUEUED waits for 2 cuda devices, 1 of 2 free; position 1", "QUEUED waits behind b; 1 cuda device free; position 2"));
  EXPECT_THAT(Decide(cpus_, all_)[0], "QUEUED waits for 1 cuda device, 0 of 2 free; position 1");
}

TEST_F(Kinds, WhatTheGpusCanNeverTakeIsNotLaidOnCpus) {
  Job("a", 3), Job("b", 2);
  EXPECT_THAT(Decide(all_, all_), ElementsAre("NO_CAPACITY needs 3 cuda devices, the cluster has 2; position 1", "cuda:0 cuda:1"));
}

TEST_F(Kinds, WithoutGpusCpusAreTaken) {
  Job("a", 3);
  EXPECT_THAT(Decide(cpus_, cpus_), ElementsAre("cpu:0 cpu:1 cpu:2"));
}

TEST_F(Kinds, WhatRanGoesOnOnTheSameKind) {
  Job("a", 1).mutable_plan()->add_ranks()->set_device("cuda:1");
  Job("b", 1).mutable_plan()->add_ranks()->set_device("cpu:1");
  EXPECT_THAT(Decide(cpus_, cpus_), ElementsAre("NO_CAPACITY needs 1 cuda device as before, the cluster has 0; position 1", "cpu:0"));
  EXPECT_THAT(Decide(all_, all_), ElementsAre("cuda:0", "cpu:0"));
  EXPECT_THAT(Decide(gpus_, gpus_), ElementsAre("cuda:0", "cuda:1")) << "no CPU slot is left in the cluster";
}

TEST_F(Kinds, WhatRanOnCpusIsNotStrandedByAGpuThatIsTooSmallForIt) {
  v1::JobRecord& job = Job("a", 3);
  for (const char* device : {"cpu:0", "cpu:1", "cpu:2"}) job.mutable_plan()->add_ranks()->set_device(device);
  EXPECT_THAT(Decide(all_, all_), ElementsAre("cpu:0 cpu:1 cpu:2"));
  EXPECT_THAT(Decide(Both(Devices(0, 2), gpus_), all_), ElementsAre("QUEUED waits for 3 cpu devices, 2 of 4 free; position 1"));
  const std::vector<OfferedDevice> fewer = Both(Devices(0, 2), gpus_);
  EXPECT_THAT(Decide(fewer, fewer), ElementsAre("NO_CAPACITY needs 3 cpu devices as before, the cluster has 2; position 1"));
}

// 2026-11-23 12:00:00 UTC and an hour later.
constexpr int64_t kNoon = 1795435200000, kOne = kNoon + 3600000;

TEST_F(Kinds, AJobThatNeverRanWaitsForGpusThatAreAwayAndSaysSo) {
  Job("a", 1);
  EXPECT_THAT(Decide(cpus_, cpus_, {{"gpu-1", 2, kNoon, kOne}}),
              ElementsAre("NO_CAPACITY needs 1 cuda device, the cluster has 0; gpu-1 with 2 (since 2026-11-23 12:00:00 UTC) is away: jobs wait for it until "
                          "2026-11-23 13:00:00 UTC before they take CPU slots; position 1"));
  EXPECT_THAT(Decide(cpus_, cpus_, {{"gpu-1", 2, 0, 0}}), ElementsAre("NO_CAPACITY needs 1 cuda device, the cluster has 0; gpu-1 with 2 is away; position 1"));
  EXPECT_THAT(Decide(cpus_, cpus_, {{"g", 1, kNoon, kNoon + 1000}, {"h", 4, kNoon, kOne}})[0],
              testing::HasSubstr("are away: jobs wait for them until 2026-11-23 13:00:00 UTC"));
  const v1::Reason reason = DecideQueue({records_[0].get()}, cpus_, cpus_, {{"gpu-1", 2, kNoon, kOne}}, TakeAsAsked, 0).at(0).reason;
  EXPECT_THAT(reason.remedy(), testing::HasSubstr("bring gpu-1 back"));
  EXPECT_THAT(reason.remedy(), testing::HasSubstr("--gpu_wait"));
}

TEST_F(Kinds, GpusThatAreAwayHoldNobodyUpWhoCanRun) {
  Job("a", 3), Job("b", 2), Job("c", 1).mutable_plan()->add_ranks()->set_device("cpu:1");
  const std::vector<AwayGpus> away = {{"gpu-1", 2, kNoon, kOne}};
  EXPECT_THAT(Decide(all_, all_, away), ElementsAre("NO_CAPACITY needs 3 cuda devices, the cluster has 2; gpu-1 with 2 (since 2026-11-23 12:00:00 UTC) is "
                                                    "away; position 1",
                                                    "cuda:0 cuda:1", "cpu:0"));
  EXPECT_THAT(Decide({}, {}, away)[2], "NO_CAPACITY needs 1 device, the cluster has 0; position 3") << "what ran on CPU slots waits for them";
}

std::vector<OfferedDevice> Gpus(const std::vector<int>& gib) {
  std::vector<OfferedDevice> devices = Devices(0, static_cast<int>(gib.size()), "cuda");
  for (size_t i = 0; i < gib.size(); ++i) devices[i].device.set_memory_bytes(int64_t{gib[i]} << 30);
  return devices;
}

// Takes devices of at least micro_batch_size GiB, and fills those that are three times as large.
PlanAttempt TakeWithMemory(const v1::JobRecord& record, const std::vector<OfferedDevice>& devices, const std::string& kind) {
  const int64_t least = int64_t{record.job().spec().training().micro_batch_size()} << 30;
  for (const int64_t bytes : {3 * least, least}) {
    std::vector<OfferedDevice> enough;
    for (const OfferedDevice& device : devices) {
      if (device.device.memory_bytes() == 0 || device.device.memory_bytes() >= bytes) enough.push_back(device);
    }
    PlanAttempt attempt = TakeAsAsked(record, enough, kind);
    if (!attempt.plan.has_value()) continue;
    for (v1::RankPlan& rank : *attempt.plan->mutable_ranks()) rank.set_peak_bytes(bytes);
    return attempt;
  }
  return TakeAsAsked(record, {}, kind);
}

// What a job that waits for `num` devices of at least `gib` is told.
std::string Waits(int num, int gib, const std::vector<OfferedDevice>& all, const std::vector<size_t>& free, const std::string& excluded = "") {
  v1::JobRecord record;
  record.mutable_job()->set_id("a");
  record.mutable_job()->mutable_spec()->mutable_parallel()->set_pipeline_parallel_size(num);
  record.mutable_job()->mutable_spec()->mutable_training()->set_micro_batch_size(gib);
  if (!excluded.empty()) (*record.mutable_retry()->mutable_failures_by_worker())[excluded] = 2;
  std::vector<OfferedDevice> idle;
  for (const size_t i : free) idle.push_back(all[i]);
  return DecideQueue({&record}, idle, all, {}, TakeWithMemory, 0).at(0).reason.message();
}

TEST(UnlikeDevices, AJobThatWaitsCountsThoseThatAreLargeEnoughForIt) {
  const std::vector<OfferedDevice> all = Gpus({24, 24, 80, 24});
  EXPECT_EQ(Waits(1, 30, all, {0}), "waits for 1 cuda device of 80.0 GiB or more, 0 of 1 such free (3 are too small); position 1");
  EXPECT_EQ(Waits(2, 40, Gpus({80, 24, 80, 40}), {0, 1}), "waits for 2 cuda devices of 40.0 GiB or more each, 1 of 3 such free (1 is too small); position 1");
  EXPECT_EQ(Waits(1, 20, all, {}), "waits for 1 cuda device, 0 of 4 free; position 1") << "a larger one would be filled, but a small one suffices";
  EXPECT_EQ(Waits(4, 20, all, {0, 2}), "waits for 4 cuda devices, 2 of 4 free; position 1");
  EXPECT_EQ(Waits(2, 30, Gpus({0, 24, 40}), {2}), "waits for 2 cuda devices of 40.0 GiB or more each, 1 of 2 such free (1 is too small); position 1")
      << "unknown memory counts as enough";
  EXPECT_EQ(Waits(1, 30, Gpus({0, 24}), {1}), "waits for 1 cuda device of 90.0 GiB or more, 0 of 1 such free (1 is too small); position 1");
}

TEST(UnlikeDevices, AnExcludedWorkersAreNotCounted) {
  std::vector<OfferedDevice> all = Gpus({80, 80, 80});
  all[1].worker = "bad";
  EXPECT_EQ(Waits(2, 30, all, {0, 1}, "bad"), "waits for 2 cuda devices, 1 of 2 free; position 1; bad failed this job twice and is left out");
}

TEST_F(Kinds, AnExcludedWorkersGpuIsUsedAgainRatherThanACpu) {
  (*Job("a", 1).mutable_retry()->mutable_failures_by_worker())["gpu"] = 2;
  std::vector<OfferedDevice> all = all_;
  for (OfferedDevice& device : all) device.worker = device.device.kind() == "cuda" ? "gpu" : "cpu";
  EXPECT_THAT(Decide(all, all), ElementsAre("cuda:0"));
}

}  // namespace
}  // namespace ppft::coordinator
