// Replicas of one stage with ZeRO 0 to 3 over NCCL: with one GPU a group of one, which goes through all the calls; with two GPUs a thread for each.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "tests/gpu/gpu.h"
#include "tests/gpu/model.h"
#include "worker/trainer/engine/device_adapter_state.h"
#include "worker/trainer/engine/device_replica_exchange.h"
#include "worker/trainer/torch/torch_status.h"

namespace ppft::trainer {
namespace {

constexpr int kSteps = 4;
constexpr int kMicrobatches = 4;  // of all replicas
constexpr int64_t kTokens = 192;

// An odd number of layers and sizes that no two replicas can share out evenly.
model::ModelConfig Config() { return ConfigOf(256, 712, 5, 8, 4, 32, 1000, /*tied=*/true); }

MicrobatchInput MakeInput(int step, int microbatch) {
  at::manual_seed(100 * step + microbatch);
  MicrobatchInput input;
  input.step = step;
  input.microbatch = microbatch;
  input.cu_seqlens = {0, 70, static_cast<int32_t>(kTokens)};
  input.ids = at::randint(1000, {kTokens}, at::kLong);
  input.target_rows = at::arange(5 + microbatch, 155, at::kLong);
  input.target_ids = at::randint(1000, input.target_rows.sizes(), at::kLong);
  input.loss_weight = 1.0 / (kMicrobatches * 150);
  return input;
}

// Made once: the generator is everybody's.
const MicrobatchInput& Input(int step, int microbatch) {
  static const std::vector<MicrobatchInput> inputs = [] {
    std::vector<MicrobatchInput> made;
    for (int i = 0; i < kSteps * kMicrobatches; ++i) made.push_back(MakeInput(1 + i / kMicrobatches, i % kMicrobatches));
    return made;
  }();
  return inputs[static_cast<size_t>((step - 1) * kMicrobatches + microbatch)];
}

// One replica: its stage, its place in the group.
struct Replica {
  int device = 0;
  int index = 0;
  int size = 1;
  int zero_stage = 0;
  std::unique_ptr<StageModel> stage;
  std::unique_ptr<DeviceComm> comm;

  // Filled by Train.
  std::vector<double> losses;  // of its micro-batches, by step
  std::vector<double> norms;   // of all gradients: its share of the squares
  std::vector<NamedTensor> checkpoint;
  std::vector<float> masters;
  HeldBytes held;
  int64_t moment_bytes = 0;
  absl::Status status;
};

std::unique_ptr<StageModel> MakeStage(const Replica& replica, at::ScalarType compute) {
  const model::ModelConfig config = Config();
  StageOptions options;
  options.num_layers = static_cast<int>(config.num_layers);
  options.has_embedding = options.has_head = true;
  options.compute = compute;
  options.lora = {8, 2.0, 0.0, 11, AllTargets()};
  options.head_chunk_rows = 64;
  options.device = at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(replica.device));
  options.kernels = &Gpu().KernelsOf(replica.device);
  if (replica.zero_stage >= 3) options.weights = WeightHome::kSharded;
  options.num_replicas = replica.size;
  options.replica = replica.index;
  auto stage = StageModel::Create(config, options, RandomSource(config, at::kFloat));
  EXPECT_TRUE(stage.ok()) << stage.status();
  return *std::move(stage);
}

// The trainer's step, but for the exchange of the norms, which the replicas need for clipping: there is none here.
absl::Status Train(Replica* replica) {
  DeviceReplicaExchange exchange(replica->comm.get(), replica->size, replica->index);
  replica->stage->Attach(&exchange);
  PPFT_ASSIGN_OR_RETURN(const std::unique_ptr<AdapterState> adapter,
                        DeviceAdapterState::Create(AdamWOptions(), replica->zero_stage, {replica->stage.get()}, &Gpu(),
                                                   {replica->comm.get(), replica->index, replica->size}, &exchange));
  for (int step = 1; step <= kSteps; ++step) {
    adapter->ZeroGradients();
    replica->stage->loss_total().zero_();
    for (int m = replica->index; m < kMicrobatches; m += replica->size) {
      PPFT_RETURN_IF_ERROR(replica->stage->Forward(Input(step, m), at::Tensor(), true, nullptr).status());
      PPFT_RETURN_IF_ERROR(replica->stage->Backward(Input(step, m), at::Tensor()).status());
    }
    // A micro-batch that is empty here alone: the others still need this replica.
    PPFT_RETURN_IF_ERROR(replica->stage->Idle(/*backward=*/false));
    PPFT_RETURN_IF_ERROR(replica->stage->Idle(/*backward=*/true));
    PPFT_RETURN_IF_ERROR(adapter->ReduceGradients());
    PPFT_ASSIGN_OR_RETURN(const std::vector<double> sums, adapter->Sums(replica->stage->loss_total()));
    replica->losses.push_back(sums[0]);
    double squares = 0;
    for (size_t i = 1; i < sums.size(); ++i) squares += sums[i];
    replica->norms.push_back(squares);
    PPFT_RETURN_IF_ERROR(adapter->Update(step, 1e-3, 1.0));
  }
  PPFT_ASSIGN_OR_RETURN(replica->checkpoint, adapter->CheckpointTensors());
  replica->masters = adapter->CopyMasters();
  replica->held = replica->stage->held_bytes();
  replica->moment_bytes = adapter->moment_bytes();
  // Back from the checkpoint to the same state.
  PPFT_RETURN_IF_ERROR(adapter->Restore([&](const std::string& name) -> absl::StatusOr<at::Tensor> {
    for (const NamedTensor& tensor : replica->checkpoint) {
      if (tensor.name == name) return tensor.tensor;
    }
    return absl::NotFoundError(name);
  }));
  PPFT_ASSIGN_OR_RETURN(const std::vector<NamedTensor> again, adapter->CheckpointTensors());
  for (size_t i = 0; i < again.size(); ++i) {
    if (!at::equal(again[i].tensor, replica->checkpoint[i].tensor)) return absl::DataLossError(absl::StrCat(again[i].name, " changed on its way back"));
  }
  return absl::OkStatus();
}

class CudaReplicasTest : public testing::Test {
 protected:
  void SetUp() override { Gpu().SetDeterministic(true); }
  void TearDown() override { Gpu().SetDeterministic(false); }
};

Replica Alone(int zero_stage, at::ScalarType compute, int device = 0) {
  Replica replica;
  replica.device = device;
  replica.zero_stage = zero_stage;
  replica.stage = MakeStage(replica, compute);
  DeviceComms& comms = Gpu().CommsOf(device);
  replica.comm = comms.Make(comms.NewId(), 1, 0);
  replica.status = Train(&replica);
  EXPECT_TRUE(replica.status.ok()) << replica.status;
  return replica;
}

TEST_F(CudaReplicasTest, AGroupOfOneTrainsAsWithoutZero) {
  for (const at::ScalarType compute : {at::kBFloat16, at::kFloat}) {
    const Replica plain = Alone(0, compute);
    EXPECT_LT(plain.losses.back(), plain.losses.front());
    for (const int zero : {1, 2, 3}) {
      const Replica other = Alone(zero, compute);
      const std::string what = absl::StrCat("zero_stage ", zero, ", ", c10::toString(compute));
      if (zero == 3 && compute == at::kBFloat16) {
        // Weights that move have another layout, and the products other roundings.
        for (size_t step = 0; step < kSteps; ++step) EXPECT_NEAR(other.losses[step], plain.losses[step], 2e-3 * plain.losses[step]) << what;
        continue;
      }
      EXPECT_EQ(other.losses, plain.losses) << what;
      EXPECT_EQ(other.norms, plain.norms) << what;
      EXPECT_EQ(other.masters, plain.masters) << what;
      ASSERT_EQ(other.checkpoint.size(), plain.checkpoint.size());
      for (size_t i = 0; i < plain.checkpoint.size(); ++i) {
        EXPECT_TRUE(at::equal(other.checkpoint[i].tensor, plain.checkpoint[i].tensor)) << what << ": " << plain.checkpoint[i].name;
      }
    }
  }
}

// One thread per GPU: the replicas of a group of two.
std::vector<Replica> Two(int zero_stage, at::ScalarType compute) {
  std::vector<Replica> replicas(2);
  for (int i = 0; i < 2; ++i) {
    Replica& replica = replicas[static_cast<size_t>(i)];
    replica.device = replica.index = i;
    replica.size = 2;
    replica.zero_stage = zero_stage;
    Gpu().Use(i);
    replica.stage = MakeStage(replica, compute);
    Gpu().CommsOf(i);
    Gpu().Synchronize(i);
  }
  Gpu().Use(0);
  const DeviceCommId id = Gpu().CommsOf(0).NewId();
  std::vector<std::thread> threads;
  for (Replica& replica : replicas) {
    threads.emplace_back([&replica, &id] {
      replica.status = CatchTorch(absl::StrCat("replica ", replica.index), [&]() -> absl::Status {
        Gpu().Use(replica.device);
        replica.comm = Gpu().CommsOf(replica.device).Make(id, 2, replica.index);
        PPFT_RETURN_IF_ERROR(Train(&replica));
        Gpu().Synchronize(replica.device);
        return absl::OkStatus();
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Replica& replica : replicas) EXPECT_TRUE(replica.status.ok()) << "zero_stage " << zero_stage << ": " << replica.status;
  return replicas;
}

double Relative(double a, double b) { return std::abs(a - b) / std::abs(b); }

TEST_F(CudaReplicasTest, TwoGpusGiveTheCurveOfOneWithEveryZeroStage) {
  std::string reason;
  if (Gpu().Devices(&reason).size() < 2) GTEST_SKIP() << "one GPU alone";
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16}) {
    // A kernel's first launch may wait for its whole device, a collective that waits for the other thread among it: no kernel is new to the threads.
    Gpu().Use(1);
    Alone(3, compute, 1);
    Gpu().Use(0);
    Alone(3, compute);
    const Replica alone = Alone(0, compute);
    const double tolerance = compute == at::kFloat ? 1e-5 : 2e-3;
    std::vector<Replica> plain;
    for (const int zero : {0, 1, 2, 3}) {
      std::vector<Replica> two = Two(zero, compute);
      ASSERT_TRUE(two[0].status.ok() && two[1].status.ok());
      const std::string what = absl::StrCat("zero_stage ", zero, ", ", c10::toString(compute));
      for (size_t step = 0; step < kSteps; ++step) {
        EXPECT_LT(Relative(two[0].losses[step] + two[1].losses[step], alone.losses[step]), tolerance) << what << ", step " << step + 1;
        // All count each element once; without ZeRO each replica has all of them.
        const double squares = zero == 0 ? two[0].norms[step] : two[0].norms[step] + two[1].norms[step];
        EXPECT_LT(Relative(squares, alone.norms[step]), 100 * tolerance) << what << ", step " << step + 1;
      }
      EXPECT_EQ(two[0].masters, two[1].masters) << what;  // to the bit
      for (size_t i = 0; i < two[0].checkpoint.size(); ++i) {
        EXPECT_TRUE(at::equal(two[0].checkpoint[i].tensor, two[1].checkpoint[i].tensor)) << what << ": " << two[0].checkpoint[i].name;
      }
      if (zero == 0) {
        plain = std::move(two);
        continue;
      }
      const Replica& a = plain[0];
      for (const Replica& b : two) {
        EXPECT_NEAR(static_cast<double>(b.moment_bytes), 0.5 * static_cast<double>(a.moment_bytes), 16) << what;
        EXPECT_EQ(b.held.gradients < a.held.gradients, zero >= 2) << what;
        EXPECT_EQ(b.held.weights < a.held.weights, zero >= 3) << what;
      }
    }
  }
}

}  // namespace
}  // namespace ppft::trainer
