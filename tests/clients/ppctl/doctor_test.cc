// What doctor makes of what the coordinator says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/time/time.h"
#include "tests/clients/ppctl/fake_coordinator.h"

namespace ppft::ctl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::json;

class DoctorTest : public ::testing::Test {
 protected:
  DoctorTest() {
    v1::GetStatusResponse& status = coordinator_.status;
    status.set_version(Version());
    status.set_data_dir("/data");
    status.set_data_bytes_free(int64_t{100} << 30);
    coordinator_.clock_ahead = absl::ZeroDuration();
    coordinator_.workers = {Worker("worker-0", "host-a"), Worker("worker-1", "host-b")};
    coordinator_.files.set_num_models(2);
    coordinator_.files.set_num_datasets(3);
  }

  std::string Version() {
    std::string version = Ppctl(coordinator_, {"version"}).out;
    version.pop_back();
    return version;
  }

  v1::Worker Worker(const std::string& name, const std::string& host) {
    v1::Worker worker;
    worker.set_name(name);
    worker.set_state("ready");
    worker.set_version(Version());
    worker.set_address("10.0.0.1");
    worker.mutable_host()->set_hostname(host);
    worker.mutable_host()->set_torch("LibTorch 2.11.0 at /torch");
    worker.mutable_host()->set_nccl("2.28.9");
    worker.set_disk_free_bytes(int64_t{100} << 30);
    for (int i = 0; i < 2; ++i) {
      v1::Device* device = worker.add_devices();
      device->set_id("cuda:" + std::to_string(i));
      device->set_kind("cuda");
      device->set_name("NVIDIA H200");
      device->set_memory_bytes(int64_t{140} << 30);
      device->set_compute_capability("9.0");
      device->set_driver("580.65");
    }
    return worker;
  }

  // The line that holds `text` must be of this level; the exit code must be the one.
  void Expect(const std::string& level, const std::string& text, const std::string& remedy, int code) {
    const Outcome run = Ppctl(coordinator_, {"doctor"});
    EXPECT_EQ(run.code, code) << run.out << run.err;
    const size_t at = run.out.find(text);
    ASSERT_NE(at, std::string::npos) << "no \"" << text << "\" in\n" << run.out;
    const size_t begin = run.out.rfind('\n', at) == std::string::npos ? 0 : run.out.rfind('\n', at) + 1;
    EXPECT_TRUE(absl::StartsWith(run.out.substr(begin), level)) << run.out.substr(begin, 200);
    EXPECT_THAT(run.out.substr(at), HasSubstr(remedy));
  }

  FakeCoordinator coordinator_;
};

TEST_F(DoctorTest, AllIsWell) {
  const Outcome run = Ppctl(coordinator_, {"doctor"});
  EXPECT_EQ(run.code, 0) << run.out;
  EXPECT_THAT(run.out, Not(HasSubstr("fail")));
  EXPECT_THAT(run.out, Not(HasSubstr("warn")));
  EXPECT_THAT(run.out, HasSubstr("ok    worker worker-0: 2 x NVIDIA H200 (cuda:0, cuda:1), 140.0 GiB, compute capability 9.0, driver 580.65"));
  EXPECT_THAT(run.out, HasSubstr("LibTorch 2.11.0 at /torch, NCCL 2.28.9"));
  EXPECT_THAT(run.out, HasSubstr("2 models and 3 datasets are there with their sizes"));
  const Json checks = Json::parse(Ppctl(coordinator_, {"doctor", "-o", "json"}).out)["checks"];
  ASSERT_GT(checks.size(), 5u);
  EXPECT_EQ(checks[0]["level"], "ok");
  EXPECT_EQ(checks[0]["check"], "coordinator");
  EXPECT_EQ(Ppctl(coordinator_, {"doctor", "-o", "name"}).out, "");
}

TEST_F(DoctorTest, WorkersInTrouble) {
  coordinator_.workers[1].set_state("lost");
  coordinator_.workers[1].mutable_heartbeat_age()->set_seconds(75);
  Expect("fail", "worker worker-1: lost: it is not connected; its last sign of life is 1m15s old", "what to do: look whether ppft-worker runs on host-b", 1);
  EXPECT_EQ(Ppctl(coordinator_, {"doctor", "-o", "name"}).out, "worker worker-1\n");
  coordinator_.workers[1] = Worker("worker-1", "host-b");
  coordinator_.workers[1].clear_devices();
  coordinator_.workers[1].set_state("unusable");
  coordinator_.workers[1].add_problems("--devices cuda:all: no NVIDIA driver on this machine");
  Expect("fail", "no NVIDIA driver on this machine", "what to do", 1);
  EXPECT_THAT(Ppctl(coordinator_, {"workers", "list"}).out, HasSubstr("worker-1: --devices cuda:all: no NVIDIA driver on this machine\n"));
  coordinator_.workers.clear();
  Expect("fail", "no worker is connected", "ppft-worker --coordinator", 1);
}

TEST_F(DoctorTest, HostsThatDoNotFit) {
  coordinator_.workers[1].set_address("127.0.0.1");
  Expect("fail", "which others cannot reach", "--address", 1);
  coordinator_.workers[1] = Worker("worker-1", "host-b");
  coordinator_.workers[1].mutable_host()->set_nccl("2.27.3");
  Expect("fail", "NCCL 2.27.3 and 2.28.9", "one torch", 1);
  coordinator_.workers[1] = Worker("worker-1", "host-b");
  coordinator_.workers[1].mutable_devices(1)->set_compute_capability("7.5");
  Expect("fail", "cuda:1 has compute capability 7.5", "--devices", 1);
  coordinator_.workers[1] = Worker("worker-1", "host-b");
  coordinator_.workers[1].set_version("0.0.1");
  Expect("warn", "it is of version 0.0.1", "one version", 0);
  coordinator_.workers[1] = Worker("worker-1", "host-b");
  coordinator_.workers[1].mutable_clock()->set_offset_nanos(-90000000000);
  Expect("warn", "its clock differs from the coordinator's by +90.000 s", "time server", 0);
  coordinator_.workers[1] = Worker("worker-1", "host-b");
  coordinator_.workers[1].set_disk_free_bytes(1000);
  Expect("fail", ": 1000 B free on the disk of its --work_dir", "--cache_limit_gib", 1);
}

TEST_F(DoctorTest, TheCoordinatorInTrouble) {
  coordinator_.status.set_data_bytes_free(int64_t{5} << 30);
  Expect("warn", "5.0 GiB free for /data", "make room", 0);
  coordinator_.status.set_data_bytes_free(1000);
  Expect("fail", ": 1000 B free for /data", "make room", 1);
  coordinator_.status.set_data_bytes_free(int64_t{100} << 30);
  coordinator_.clock_ahead = absl::Hours(1);
  Expect("warn", "the coordinator's clock differs", "time server", 0);
  coordinator_.clock_ahead.reset();
  v1::FileProblem* problem = coordinator_.files.add_problems();
  problem->set_owner("model tiny");
  problem->set_message("/models/tiny/model.safetensors is shorter than it was");
  problem->set_remedy("put the files back");
  Expect("fail", "model tiny: /models/tiny/model.safetensors is shorter than it was", "what to do: put the files back", 1);
  coordinator_.Fail("CheckFiles", grpc::StatusCode::PERMISSION_DENIED, "operators only");
  Expect("warn", "operators only", "", 0);
  coordinator_.Fail("GetStatus", grpc::StatusCode::UNAUTHENTICATED, "no token");
  Expect("fail", "no token", "", 4);
  coordinator_.Stop();
  Expect("fail", "coordinator: cannot reach a coordinator", "", 5);
}

}  // namespace
}  // namespace ppft::ctl
