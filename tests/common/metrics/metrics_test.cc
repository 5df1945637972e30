#include "common/metrics/metrics.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"

namespace ppft::metrics {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string Get(const std::string& address, const std::string& path) {
  int port = 0;
  EXPECT_TRUE(absl::SimpleAtoi(address.substr(address.rfind(':') + 1), &port));
  Fd fd(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  EXPECT_TRUE(WriteAll(fd.get(), absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), "request").ok());
  std::string out(1 << 20, '\0');
  size_t size = 0;
  ssize_t got;
  while ((got = read(fd.get(), out.data() + size, out.size() - size)) > 0) size += static_cast<size_t>(got);
  out.resize(size);
  return out;
}

TEST(CoordinatorMetricsTest, SeriesAppearFollowTotalsAndGoWithTheJob) {
  CoordinatorMetrics metrics("1.2.3");
  auto server = HttpServer::Start("127.0.0.1:0", metrics.registry(), [] { return std::string("[]"); });
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_THAT(Get((*server)->address(), "/metrics"), HasSubstr("ppft_artifact_bytes_total{direction=\"download\"} 0"));
  metrics.SetJobState("job-a", "QUEUED");
  metrics.SetJobState("job-a", "RUNNING");
  metrics.FollowJobTokens("job-a", 100, 10);
  metrics.FollowJobTokens("job-a", 60, 6);  // recovered from a checkpoint
  metrics.FollowJobTokens("job-a", 90, 9);
  metrics.AddJobRestart("job-a", "WORKER_LOST");
  metrics.CountRpc("/ppft.v1.JobService/GetJob", "OK", absl::Milliseconds(1));
  const std::string text = Get((*server)->address(), "/metrics");
  EXPECT_THAT(text, HasSubstr("ppft_job_state{job=\"job-a\",state=\"QUEUED\"} 0"));
  EXPECT_THAT(text, HasSubstr("ppft_job_state{job=\"job-a\",state=\"RUNNING\"} 1"));
  EXPECT_THAT(text, HasSubstr("ppft_job_tokens_total{job=\"job-a\",kind=\"all\"} 130"));
  EXPECT_THAT(text, HasSubstr("ppft_build_info{component=\"coordinator\",version=\"1.2.3\"} 1"));
  metrics.DropJob("job-a");
  EXPECT_THAT(Get((*server)->address(), "/metrics"), Not(HasSubstr("job-a")));
  EXPECT_THAT(Get((*server)->address(), "/sd"), HasSubstr("[]"));
}

// As on a worker that holds two replicas of a stage, whose reports come by turns.
TEST(WorkerMetricsTest, EveryReplicaOfAStageHasItsOwnTotals) {
  WorkerMetrics metrics("1", "w");
  auto server = HttpServer::Start("127.0.0.1:0", metrics.registry());
  ASSERT_TRUE(server.ok()) << server.status();
  const WorkerMetrics::Place first = {"job-a", "1", "0"}, second = {"job-a", "1", "1"};
  for (const double seconds : {10.0, 20.0}) {
    metrics.FollowStageBusy(first, "forward", seconds);
    metrics.FollowStageBusy(second, "forward", seconds / 2);
  }
  metrics.BeginAttempt(first);
  metrics.FollowStageBusy(first, "forward", 3);
  metrics.FollowStageBusy(second, "forward", 11);
  const std::string text = Get((*server)->address(), "/metrics");
  EXPECT_THAT(text, HasSubstr("ppft_stage_busy_seconds_total{job=\"job-a\",kind=\"forward\",replica=\"0\",stage=\"1\"} 23"));
  EXPECT_THAT(text, HasSubstr("ppft_stage_busy_seconds_total{job=\"job-a\",kind=\"forward\",replica=\"1\",stage=\"1\"} 11"));
  metrics.DropJob("job-a");
  EXPECT_THAT(Get((*server)->address(), "/metrics"), Not(HasSubstr("job-a")));
}

TEST(CoordinatorMetricsTest, PromtoolFindsNothingWrong) {
  if (system("command -v promtool > /dev/null") != 0) GTEST_SKIP() << "promtool is not installed (Debian package prometheus)";
  CoordinatorMetrics coordinator("1");
  coordinator.SetJobState("j", "RUNNING");
  coordinator.SetJobStep("j", 1);
  coordinator.SetJobLoss("j", 1);
  coordinator.SetJobEvalLoss("j", 1);
  coordinator.SetJobLearningRate("j", 1);
  coordinator.SetJobGradNorm("j", 1);
  coordinator.SetJobLossScale("j", 1);
  coordinator.SetJobTokensPerSecond("j", 1);
  coordinator.SetJobEtaSeconds("j", 1);
  coordinator.SetCheckpointTime("j", absl::Now());
  coordinator.FollowJobTokens("j", 1, 1);
  coordinator.FollowJobSkippedSteps("j", 1);
  coordinator.AddJobRestart("j", "X");
  coordinator.SetWorkerHeartbeatAge("w", absl::Seconds(1));
  coordinator.CountRpc("m", "OK", absl::Seconds(1));
  coordinator.AddArtifactBytes("upload", 1);
  WorkerMetrics worker("1", "w");
  const WorkerMetrics::Place place = {"j", "0", "0"};
  worker.FollowStageBusy(place, "forward", 1);
  worker.FollowStageTransport(place, "sent", 1);
  worker.SetStageMemory(place, "resident_peak", 1);
  worker.SetBubbleRatio(place, 0.5);
  for (const auto& registry : {coordinator.registry(), worker.registry()}) {
    auto server = HttpServer::Start("127.0.0.1:0", registry);
    ASSERT_TRUE(server.ok()) << server.status();
    const std::string answer = Get((*server)->address(), "/metrics");
    const std::string path = absl::StrCat(::testing::TempDir(), "ppft-metrics-", getpid());
    ASSERT_TRUE(WriteFileAtomic(path, answer.substr(answer.find("\r\n\r\n") + 4)).ok());
    EXPECT_EQ(system(absl::StrCat("promtool check metrics < ", path, " 2>&1").c_str()), 0);
    unlink(path.c_str());
  }
}

TEST(HttpServerTest, AnAddressThatCannotBeHadIsASentence) {
  CoordinatorMetrics metrics("1");
  auto first = HttpServer::Start("127.0.0.1:0", metrics.registry());
  ASSERT_TRUE(first.ok());
  const auto second = HttpServer::Start((*first)->address(), metrics.registry());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("--metrics_listen"));
  EXPECT_TRUE(absl::IsUnavailable(second.status())) << second.status();
  const absl::Status elsewhere = HttpServer::Start("192.0.2.1:0", metrics.registry()).status();  // of no host
  EXPECT_TRUE(absl::IsUnavailable(elsewhere)) << elsewhere;
  const absl::Status nonsense = HttpServer::Start("nonsense", metrics.registry()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(nonsense)) << nonsense;
}

}  // namespace
}  // namespace ppft::metrics
