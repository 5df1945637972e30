#include "worker/agent/trainer_process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <future>

#include "absl/strings/str_cat.h"

namespace ppft::agent {
namespace {

constexpr std::chrono::seconds kPatience(60);
constexpr int kOrders = 2000;  // more than a socket's buffer holds, however short they are

class TrainerProcessTest : public testing::Test {
 protected:
  TrainerProcessTest() {
    directory_ = std::filesystem::temp_directory_path() / absl::StrCat("ppft-trainer-process-test-", getpid());
    std::filesystem::create_directories(directory_);
  }
  ~TrainerProcessTest() override { std::filesystem::remove_all(directory_); }

  // Stopped before it is told anything.
  void Start(const std::string& binary) {
    TrainerCommand command;
    command.binary = binary;
    command.arguments = {"--device", "cpu:0"};
    command.directory = directory_;
    ASSERT_TRUE(process_.Start(command).ok());
    process_.Kill(SIGSTOP);
  }

  // In a thread of its own, so that a Send that blocks is a failure and not the end of the tests. False: it has not come to its end.
  bool Ends(const std::function<void()>& work) {
    std::future<void> done = std::async(std::launch::async, work);
    const bool ended = done.wait_for(kPatience) == std::future_status::ready;
    if (!ended) process_.Kill(SIGKILL);
    return ended;
  }

  void SendAll(size_t start_bytes) {
    v1::AgentMessage message;
    message.mutable_start()->set_job_id("job-a");
    message.mutable_start()->mutable_spec()->set_name("count");
    message.mutable_start()->set_listen_address("here");
    message.mutable_start()->set_model_config(std::string(start_bytes, 'c'));
    EXPECT_TRUE(process_.Send(message).ok());
    message.mutable_peers()->add_endpoints()->set_address("127.0.0.1:1");
    EXPECT_TRUE(process_.Send(message).ok());
    for (int order = 1; order <= kOrders; ++order) {
      message.mutable_trace()->set_id(order);
      EXPECT_TRUE(process_.Send(message).ok());
    }
  }

  std::string directory_;
  TrainerProcess process_;
};

TEST_F(TrainerProcessTest, OrdersForAProcessThatIsStoppedBlockNobody) {
  Start(PPFT_FAKE_TRAINER);
  for (const size_t start_bytes : {size_t{1000}, size_t{3} << 20}) ASSERT_TRUE(Ends([&] { SendAll(start_bytes); })) << start_bytes;
  process_.Kill(SIGKILL);
  EXPECT_TRUE(Ends([&] { EXPECT_EQ(process_.Receive().status().code(), absl::StatusCode::kOutOfRange); }));
  EXPECT_EQ(process_.Wait().signal(), SIGKILL);
}

TEST_F(TrainerProcessTest, WhatWaitedArrivesWholeAndInOrder) {
  Start(PPFT_FAKE_TRAINER);
  ASSERT_TRUE(Ends([&] { SendAll(size_t{3} << 20); }));
  process_.Kill(SIGCONT);
  ASSERT_TRUE(Ends([&] {
    EXPECT_TRUE(process_.Receive()->has_listening());
    EXPECT_TRUE(process_.Receive()->has_ready());
    for (int order = 1; order <= kOrders; ++order) {
      const absl::StatusOr<v1::TrainerReport> report = process_.Receive();
      ASSERT_TRUE(report.ok()) << order << ": " << report.status();
      ASSERT_EQ(report->trace().id(), order);
    }
  }));
}

// The product's own: it answers a Start that makes no sense only when all of it has come.
TEST_F(TrainerProcessTest, TheTrainerReadsWhatWaitedWhileItWasStopped) {
  Start(PPFT_TRAINER);
  ASSERT_TRUE(Ends([&] { SendAll(size_t{3} << 20); }));
  process_.Kill(SIGCONT);
  ASSERT_TRUE(Ends([&] {
    absl::StatusOr<v1::TrainerReport> report = process_.Receive();
    while (report.ok() && report->has_log()) report = process_.Receive();
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(report->has_failure()) << report->ShortDebugString();
  }));
  EXPECT_TRUE(Ends([&] { EXPECT_EQ(process_.Wait().status(), 1); }));
}

TEST_F(TrainerProcessTest, OrdersAreSentWhileReceiveWaits) {
  Start(PPFT_FAKE_TRAINER);
  std::future<absl::StatusOr<v1::TrainerReport>> report = std::async(std::launch::async, [&] { return process_.Receive(); });
  ASSERT_TRUE(Ends([&] { SendAll(size_t{3} << 20); }));
  process_.Kill(SIGCONT);
  if (report.wait_for(kPatience) != std::future_status::ready) process_.Kill(SIGKILL);
  const absl::StatusOr<v1::TrainerReport> first = report.get();
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_TRUE(first->has_listening());
}

}  // namespace
}  // namespace ppft::agent
