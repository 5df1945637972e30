// The CUDA kernels against the CPU's in fp64 on the same (rounded) inputs: real and odd shapes, strided rows, the three types; equal bits where promised.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "tests/gpu/gpu.h"
#include "tests/worker/trainer/numeric_gradient.h"
#include "worker/trainer/optim/adamw.h"

namespace ppft::trainer {
namespace {

constexpr double kEps = 1e-5;

// The share of its largest value by which a result may be off: a few roundings of the type.
double Tolerance(at::ScalarType type) { return type == at::kFloat ? 3e-6 : type == at::kHalf ? 2e-3 : 1.6e-2; }

struct Shape {
  int64_t rows, columns, padding;  // padding: further columns between the rows
};

class CudaKernelsTest : public testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    at::manual_seed(11);
    at::globalContext().setDeterministicAlgorithms(false, false);
  }

  // Random values that `type` holds exactly, in fp64 on the CPU.
  at::Tensor Random(at::IntArrayRef shape, double scale = 1.0) const { return (at::randn(shape, at::kDouble) * scale).to(type_).to(at::kDouble); }
  // The same values in `type_` on the device; rows `padding` elements wider than their columns.
  at::Tensor Device(const at::Tensor& values, int64_t padding = 0) const {
    if (values.dim() != 2) return values.to(OnGpu(type_));
    const at::Tensor wide = at::full({values.size(0), values.size(1) + padding}, std::numeric_limits<double>::quiet_NaN(), OnGpu(type_));
    at::Tensor rows = wide.narrow(1, 0, values.size(1));
    rows.copy_(values);
    return rows;
  }
  at::Tensor DeviceEmpty(int64_t rows, int64_t columns, int64_t padding = 0) const {
    return Device(at::full({rows, columns}, std::numeric_limits<double>::quiet_NaN(), at::kDouble), padding);
  }
  static at::Tensor Host(const at::Tensor& t) { return t.to(at::kCPU).to(at::kDouble); }
  void ExpectClose(const at::Tensor& actual, const at::Tensor& expected, double factor = 1.0) const {
    EXPECT_LT(RelativeError(Host(actual), expected), factor * Tolerance(type_));
  }

  const at::ScalarType type_ = GetParam();
  Kernels& cpu_ = CpuKernels();
  Kernels& gpu_ = Gpu().KernelsOf(0);
};

const Shape kShapes[] = {{1, 8, 0}, {5, 37, 0}, {7, 288, 3}, {130, 2048, 48}, {33, 4096, 32}, {3, 8192, 16}, {2, 5120, 1}};

TEST_P(CudaKernelsTest, AddRmsNormAndItsParts) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(std::to_string(s.columns) + " columns");
    const at::Tensor x = Random({s.rows, s.columns}), delta = Random({s.rows, s.columns}), weight = Random({s.columns});
    const at::Tensor sum = at::empty_like(x), normed = at::empty_like(x), rstd = at::empty({s.rows}, at::kDouble);
    cpu_.AddRmsNorm(x, delta, weight, kEps, sum, normed, rstd);
    const at::Tensor dx = Device(x, s.padding), dweight = Device(weight), dsum = DeviceEmpty(s.rows, s.columns);
    const at::Tensor dnormed = DeviceEmpty(s.rows, s.columns, s.padding), drstd = at::empty({s.rows}, OnGpu(at::kFloat));
    gpu_.AddRmsNorm(dx, Device(delta), dweight, kEps, dsum, dnormed, drstd);
    ExpectClose(dsum, sum);
    ExpectClose(dnormed, normed);
    ExpectClose(drstd, rstd);
    // The sum in place of x; the same norm without a delta; the norm made again.
    const at::Tensor again = DeviceEmpty(s.rows, s.columns, 1), rstd2 = at::empty_like(drstd);
    gpu_.AddRmsNorm(dx, Device(delta), dweight, kEps, dx, again, rstd2);
    EXPECT_TRUE(at::equal(dx, dsum) && at::equal(again, dnormed) && at::equal(rstd2, drstd));
    again.zero_();
    gpu_.AddRmsNorm(dsum, at::Tensor(), dweight, kEps, at::Tensor(), again, rstd2);
    EXPECT_TRUE(at::equal(again, dnormed) && at::equal(rstd2, drstd));
    again.zero_();
    gpu_.ApplyRmsNorm(dsum, drstd, dweight, again);
    EXPECT_TRUE(at::equal(again, dnormed));
  }
}

TEST_P(CudaKernelsTest, RmsNormBackward) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(std::to_string(s.columns) + " columns");
    const at::Tensor x = Random({s.rows, s.columns}), weight = Random({s.columns}), dnormed = Random({s.rows, s.columns}), dx = Random({s.rows, s.columns});
    const at::Tensor normed = at::empty_like(x), rstd = at::empty({s.rows}, at::kDouble);
    cpu_.AddRmsNorm(x, at::Tensor(), weight, kEps, at::Tensor(), normed, rstd);
    const at::Tensor ddx = Device(dx);
    cpu_.RmsNormBackward(dnormed, x, rstd, weight, dx);
    const at::Tensor again = ddx.clone(), dx_normed = Device(dnormed, s.padding), device_rstd = rstd.to(OnGpu(at::kFloat)),
                     want = DeviceEmpty(s.rows, s.columns);
    gpu_.RmsNormBackward(dx_normed, Device(x), device_rstd, Device(weight), ddx);
    ExpectClose(ddx, dx);
    // In one pass with the norm's output, which takes its gradient's place.
    gpu_.ApplyRmsNorm(Device(x), device_rstd, Device(weight), want);
    gpu_.RmsNormBackwardAndNormed(dx_normed, Device(x), device_rstd, Device(weight), again, dx_normed);
    EXPECT_TRUE(at::equal(again, ddx) && at::equal(dx_normed, want));
  }
}

TEST_P(CudaKernelsTest, RopeAndItsInverse) {
  for (const HeadLayout& heads : {HeadLayout{3, 1, 6}, HeadLayout{6, 6, 48}, HeadLayout{32, 8, 64}, HeadLayout{32, 8, 128}}) {
    SCOPED_TRACE(heads.head_dim);
    const int64_t rows = 37, half = heads.head_dim / 2;
    const at::Tensor angle = at::outer(at::arange(50, at::kDouble), (at::arange(half, at::kDouble) * (-6.0 / half)).exp());
    const at::Tensor cos = angle.cos(), sin = angle.sin(), position = at::randint(50, {rows}, at::kInt);
    for (const int64_t padding : {0, 5}) {
      for (const bool inverse : {false, true}) {
        const at::Tensor qkv = Random({rows, heads.row_size()}), device = Device(qkv, padding);
        cpu_.Rope(qkv, heads, cos, sin, position, inverse);
        gpu_.Rope(device, heads, cos.to(OnGpu(at::kFloat)), sin.to(OnGpu(at::kFloat)), position.to(OnGpu(at::kInt)), inverse);
        ExpectClose(device, qkv);
      }
      // Between packed rows and parts: the same rotation, and back.
      const at::Tensor packed = Device(Random({rows, heads.row_size()}), padding), rotated = packed.clone(),
                       back = DeviceEmpty(rows, heads.row_size(), padding);
      const at::Tensor dcos = cos.to(OnGpu(at::kFloat)), dsin = sin.to(OnGpu(at::kFloat)), dposition = position.to(OnGpu(at::kInt));
      const QkvParts parts = PartsOf(DeviceEmpty(rows, heads.row_size()), heads);
      gpu_.Rope(rotated, heads, dcos, dsin, dposition, /*inverse=*/false);
      gpu_.RopeToParts(packed, heads, dcos, dsin, dposition, parts);
      EXPECT_TRUE(at::equal(at::cat({parts.q, parts.k, parts.v}, 1), rotated));
      gpu_.Rope(rotated, heads, dcos, dsin, dposition, /*inverse=*/true);
      gpu_.RopeFromParts(parts, heads, dcos, dsin, dposition, back);
      EXPECT_TRUE(at::equal(back, rotated));
    }
  }
}

TEST_P(CudaKernelsTest, SwiGluAndItsGradient) {
  for (const Shape& s : {Shape{1, 8, 0}, {5, 37, 0}, {9, 768, 3}, {130, 8192, 16}, {3, 14336, 16}}) {
    SCOPED_TRACE(std::to_string(s.columns) + " columns");
    const at::Tensor gate_up = Random({s.rows, 2 * s.columns}, 3.0), dout = Random({s.rows, s.columns});
    const at::Tensor out = at::empty({s.rows, s.columns}, at::kDouble), dgate_up = at::empty_like(gate_up);
    cpu_.SwiGlu(gate_up, out);
    cpu_.SwiGluBackward(dout, gate_up, dgate_up);
    const at::Tensor device = Device(gate_up), result = DeviceEmpty(s.rows, s.columns, s.padding), gradient = at::empty_like(device);
    gpu_.SwiGlu(device, result);
    gpu_.SwiGluBackward(Device(dout, s.padding), device, gradient);
    ExpectClose(result, out);
    ExpectClose(gradient, dgate_up);
    gpu_.SwiGluBackward(Device(dout, s.padding), device, device);
    EXPECT_TRUE(at::equal(device, gradient));  // in place
    const at::Tensor both = Device(gate_up), taken = Device(dout, s.padding);
    gpu_.SwiGluBackwardAndGated(taken, both, taken);
    EXPECT_TRUE(at::equal(both, gradient) && at::equal(taken, result));
  }
}

// The gradients are SwiGluBackward's, the sums those of products up to their order; equal inputs give equal sums.
TEST_P(CudaKernelsTest, SwiGluBackwardWithSums) {
  for (const Shape& s : {Shape{1024, 128, 16}, {2111, 8192, 16}, {4096, 384, 0}}) {
    SCOPED_TRACE(std::to_string(s.columns) + " columns");
    const at::Tensor gate_up = Device(Random({s.rows, 2 * s.columns}, 2.0)), dout = Device(Random({s.rows, s.columns}), s.padding);
    const at::Tensor lora = Device(Random({s.rows, 32})), d = Device(Random({s.rows, 16}), 8), want = at::empty_like(gate_up), gated = at::empty_like(dout);
    gpu_.SwiGlu(gate_up, gated);
    gpu_.SwiGluBackward(dout, gate_up, want);
    const auto sums = [&] {
      return std::vector<at::Tensor>{at::full({s.columns, 16}, 0.5, OnGpu(at::kFloat)), at::full({s.columns, 16}, -1.0, OnGpu(at::kFloat)),
                                     at::full({16, s.columns}, 2.0, OnGpu(at::kFloat))};
    };
    const std::vector<at::Tensor> got = sums(), again = sums();
    const at::Tensor in_place = gate_up.clone(), twice = gate_up.clone();
    const bool served = gpu_.SwiGluBackwardSums(dout, in_place, lora, d, 2.0, got[0], got[1], got[2], at::Tensor());
    ASSERT_EQ(served, type_ != at::kFloat);
    if (!served) {
      EXPECT_TRUE(at::equal(in_place, gate_up));
      continue;
    }
    ExpectClose(in_place, Host(want));
    const auto product = [](const at::Tensor& a, const at::Tensor& b) { return at::mm(Host(a).t(), Host(b)); };
    EXPECT_LT(RelativeError(Host(got[0]), product(in_place.narrow(1, 0, s.columns), lora.narrow(1, 0, 16)) * 2.0 + 0.5), 1e-5);
    EXPECT_LT(RelativeError(Host(got[1]), product(in_place.narrow(1, s.columns, s.columns), lora.narrow(1, 16, 16)) * 2.0 - 1.0), 1e-5);
    EXPECT_LT(RelativeError(Host(got[2]), product(d, gated) + 2.0), 1e-4);
    gpu_.SwiGluBackwardSums(dout, twice, lora, d, 2.0, again[0], again[1], again[2], at::empty({4 << 20}, OnGpu(at::kFloat)));
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(at::equal(again[i], got[i]));
  }
}

TEST_P(CudaKernelsTest, SwiGluOfLargeGates) {
  const at::Tensor gate_up = at::full({1, 16}, 1.0, at::kDouble), out = at::empty({1, 8}, at::kDouble);
  for (int i = 0; i < 8; ++i) gate_up[0][i] = (i - 4) * 30.0;
  cpu_.SwiGlu(gate_up, out);
  const at::Tensor device = Device(gate_up), result = DeviceEmpty(1, 8);
  gpu_.SwiGlu(device, result);
  ExpectClose(result, out);
}

TEST_P(CudaKernelsTest, CrossEntropyLossAndGradient) {
  for (const Shape& s : {Shape{3, 37, 0}, {5, 1100, 3}, {64, 32000, 0}, {48, 128256, 0}, {3, 300001, 0}, {5, 640000, 0}}) {
    SCOPED_TRACE(std::to_string(s.columns) + " columns");
    const at::Tensor logits = Random({s.rows, s.columns}, 4.0), targets = at::randint(s.columns, {s.rows}, at::kLong);
    const at::Tensor device = Device(logits, s.padding), untouched = Device(logits), on_device = targets.to(OnGpu(at::kLong));
    const at::Tensor loss = at::full({1}, 0.5, at::kDouble), dloss = loss.to(OnGpu(at::kDouble)), plain = loss.to(OnGpu(at::kDouble));
    cpu_.CrossEntropy(logits, targets, 0.25, true, loss);
    gpu_.CrossEntropy(device, on_device, 0.25, true, dloss);
    const double want = loss.item<double>();
    EXPECT_NEAR(dloss.item<double>(), want, 2e-6 * want);
    ExpectClose(device, logits);
    EXPECT_LT(Host(device).sum(-1).abs().max().item<double>(), type_ == at::kFloat ? 1e-5 : 5e-3);  // a row's gradient sums to 0
    gpu_.CrossEntropy(untouched, on_device, 0.25, false, plain);
    EXPECT_EQ(plain.item<double>(), dloss.item<double>());
  }
}

TEST_P(CudaKernelsTest, RowsWithoutTargetCountForNothing) {
  const at::Tensor logits = Device(Random({6, 1104}, 4.0)), all = at::randint(1104, {6}, at::kLong).to(OnGpu(at::kLong)), some = all.clone();
  some.narrow(0, 4, 2).fill_(-1);
  const at::Tensor want = logits.narrow(0, 0, 4).clone(), got = logits.clone();
  const at::Tensor want_loss = at::zeros({1}, OnGpu(at::kDouble)), got_loss = want_loss.clone();
  gpu_.CrossEntropy(want, all.narrow(0, 0, 4), 0.25, true, want_loss);
  LossWeight weight = 7.0;  // not what counts
  weight.device = at::full({1}, 0.25, OnGpu(at::kFloat));
  gpu_.CrossEntropy(got, some, weight, true, got_loss);
  EXPECT_TRUE(at::equal(got.narrow(0, 0, 4), want) && at::equal(got_loss, want_loss));
  EXPECT_EQ(got.narrow(0, 4, 2).abs().max().item<double>(), 0.0);
}

TEST_P(CudaKernelsTest, SpreadsRows) {
  for (const int64_t columns : {2048, 37}) {
    const at::Tensor rows = Random({3, columns}), row_of = at::full({7}, -1, at::kInt);
    const at::Tensor want = at::empty({7, columns}, at::kDouble), got = DeviceEmpty(7, columns, 8);
    const int32_t places[] = {2, -1, 0, -1, -1, 1, -1};
    std::copy(std::begin(places), std::end(places), row_of.data_ptr<int32_t>());
    cpu_.SpreadRows(rows, row_of, want);
    gpu_.SpreadRows(Device(rows), row_of.to(OnGpu(at::kInt)), got);
    EXPECT_TRUE(at::equal(Host(got), want));
    EXPECT_EQ(want[1].abs().max().item<double>() + want[6].abs().max().item<double>(), 0.0);
    EXPECT_TRUE(at::equal(want[5], rows[1]));
  }
}

// Large products are tuned when their shape comes first; before, after, and for rows in between the values are a product's.
TEST_P(CudaKernelsTest, LargeProducts) {
  for (const int64_t tokens : {2048, 1999, 2048}) {
    const at::Tensor a = Device(Random({tokens, 2048}), 16), b = Device(Random({4096, 2048}), 48), c = Device(Random({4096, 2048}, 0.1));
    for (const auto& [left, right] : {std::make_pair(a, b.t()), std::make_pair(Device(Random({tokens, 4096}), 32), c)}) {
      const at::Tensor got = DeviceEmpty(tokens, right.size(1), 24);
      gpu_.MatMul(left, right, got);
      const at::Tensor want = at::mm(left.to(at::kFloat), right.to(at::kFloat)).to(type_);
      EXPECT_LT(RelativeError(Host(got), Host(want)), type_ == at::kFloat ? 1e-5 : Tolerance(type_));
    }
  }
}

TEST_P(CudaKernelsTest, SumsTakeProductsInFp32) {
  const at::Tensor a = Device(Random({300, 16}), 8), b = Device(Random({300, 704}), 3), sum = at::full({16, 704}, 0.5, OnGpu(at::kFloat));
  gpu_.AddProduct(a.t(), b, 2.0, sum);
  const at::Tensor want = at::mm(Host(a).t(), Host(b)).mul_(2.0).add_(0.5);
  EXPECT_LT(RelativeError(Host(sum), want), 1e-5);
}

TEST_P(CudaKernelsTest, CrossEntropyIsTheSameTwice) {
  for (const int64_t columns : {4096, 128256}) {
    const at::Tensor logits = Device(Random({700, columns}, 4.0)), targets = at::randint(columns, {700}, at::kLong).to(OnGpu(at::kLong));
    at::Tensor gradients[2], losses[2];
    for (int i = 0; i < 2; ++i) {
      gradients[i] = logits.clone();
      losses[i] = at::zeros({1}, OnGpu(at::kDouble));
      gpu_.CrossEntropy(gradients[i], targets, 1.0, true, losses[i]);
    }
    EXPECT_TRUE(at::equal(gradients[0], gradients[1]) && at::equal(losses[0], losses[1]));
  }
}

TEST_P(CudaKernelsTest, DropoutHasTheBitsOfTheCpu) {
  for (const Shape& s : {Shape{1, 1, 0}, {5, 37, 0}, {9, 288, 3}, {65, 8192, 16}}) {
    for (const double p : {0.05, 0.5}) {
      const DropoutSequence sequence{{0x12345678u, 0x9abcdef0u}, 77, p};
      const at::Tensor x = at::randn({s.rows, s.columns}, at::kFloat).to(type_), dout = at::randn({s.rows, s.columns}, at::kFloat).to(type_);
      const at::Tensor out = at::empty_like(x), dx = x.clone();
      cpu_.Dropout(x, sequence, out);
      cpu_.DropoutBackward(dout, sequence, dx);
      const at::Tensor device = Device(x, s.padding), result = DeviceEmpty(s.rows, s.columns), gradient = Device(x, s.padding);
      gpu_.Dropout(device, sequence, result);
      gpu_.DropoutBackward(Device(dout), sequence, gradient);
      EXPECT_TRUE(at::equal(result.to(at::kCPU), out));
      EXPECT_TRUE(at::equal(gradient.to(at::kCPU), dx));
      gpu_.Dropout(device, sequence, device);
      EXPECT_TRUE(at::equal(device.to(at::kCPU), out));  // in place
      // Rows that are told what they draw as, in reverse order.
      std::vector<int32_t> drawn;
      for (int64_t row = 0; row < s.rows; ++row) drawn.insert(drawn.end(), {11, -12, static_cast<int32_t>(s.rows - 1 - row), 0});
      DropoutSequence told{{}, 77, p, at::tensor(drawn, at::kInt).view({s.rows, 4})};
      cpu_.Dropout(x, told, out);
      told.rows = told.rows.to(result.device());
      gpu_.Dropout(Device(x, s.padding), told, result);
      EXPECT_TRUE(at::equal(result.to(at::kCPU), out));
    }
  }
}

// Real head shapes, documents of one length and of many, an odd layout for each type.
struct AttentionCase {
  HeadLayout heads;
  std::vector<int32_t> cu;
  int64_t padding;  // of out and dout: LoRA columns
};

const std::vector<AttentionCase>& AttentionCases() {
  static const std::vector<AttentionCase> cases = {
      {{32, 8, 64}, {0, 512}, 16},
      {{32, 8, 64}, {0, 100, 356, 356, 400, 401, 700}, 16},
      {{32, 8, 64}, {0, 256, 512, 768}, 16},
      {{6, 6, 48}, {0, 200, 400, 517}, 0},
      {{8, 2, 128}, {0, 33, 300, 640}, 4},  // out's rows are not aligned
      {{16, 4, 64}, {0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640}, 8},
      {{8, 4, 100}, {0, 120, 121, 500}, 4},  // heads that neither cuDNN nor flash takes
  };
  return cases;
}

class AttentionRun {
 public:
  AttentionRun(Kernels& kernels, const AttentionCase& c, const at::TensorOptions& options, const at::Tensor& qkv, const at::Tensor& dout) {
    const int64_t tokens = c.cu.back();
    const at::ScalarType acc = options.dtype() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor rows = qkv.to(options);
    at::Tensor gradient = at::full({tokens, c.heads.q_size() + c.padding}, 1e4, options).narrow(1, 0, c.heads.q_size());
    gradient.copy_(dout);
    out = at::full({tokens, c.heads.q_size() + c.padding}, 1e4, options).narrow(1, 0, c.heads.q_size());
    dqkv = at::full({tokens, c.heads.row_size()}, 1e4, options);
    const at::Tensor lse = at::empty({c.heads.q_heads, tokens + 9}, options.dtype(acc)).narrow(1, 0, tokens);
    kernels.Attention(rows, c.heads, c.cu, out, lse);
    kernels.AttentionBackward(gradient, rows, c.heads, c.cu, out, lse, dqkv);
  }

  at::Tensor out, dqkv;
};

TEST_P(CudaKernelsTest, AttentionOfDocuments) {
  for (size_t i = 0; i < AttentionCases().size(); ++i) {
    const AttentionCase& c = AttentionCases()[i];
    const at::Tensor qkv = Random({c.cu.back(), c.heads.row_size()}), dout = Random({c.cu.back(), c.heads.q_size()});
    const AttentionRun want(cpu_, c, at::kDouble, qkv, dout);
    for (const bool deterministic : {false, true}) {
      SCOPED_TRACE("case " + std::to_string(i) + (deterministic ? ", deterministic" : ""));
      at::globalContext().setDeterministicAlgorithms(deterministic, false);
      const AttentionRun got(gpu_, c, OnGpu(type_), qkv, dout);
      ExpectClose(got.out, want.out, type_ == at::kFloat ? 10.0 : 1.0);
      ExpectClose(got.dqkv, want.dqkv, type_ == at::kFloat ? 20.0 : 2.0);
      if (deterministic || type_ == at::kFloat) {
        const AttentionRun again(gpu_, c, OnGpu(type_), qkv, dout);
        EXPECT_TRUE(at::equal(again.out, got.out) && at::equal(again.dqkv, got.dqkv));
      }
    }
  }
}

TEST_P(CudaKernelsTest, AttentionStaysInsideDocuments) {
  const AttentionCase both = {{8, 2, 64}, {0, 150, 400}, 16}, second = {{8, 2, 64}, {0, 250}, 16};
  const at::Tensor qkv = Random({400, both.heads.row_size()}), dout = Random({400, both.heads.q_size()});
  const AttentionRun all(gpu_, both, OnGpu(type_), qkv, dout);
  const AttentionRun part(gpu_, second, OnGpu(type_), qkv.narrow(0, 150, 250), dout.narrow(0, 150, 250));
  ExpectClose(all.out.narrow(0, 150, 250), Host(part.out), type_ == at::kFloat ? 10.0 : 1.0);
  ExpectClose(all.dqkv.narrow(0, 150, 250), Host(part.dqkv), type_ == at::kFloat ? 20.0 : 2.0);
}

INSTANTIATE_TEST_SUITE_P(Types, CudaKernelsTest, testing::Values(at::kFloat, at::kBFloat16, at::kHalf),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

// Parameters in the flat buffer: sizes around the chunk's, with compute copies as A (dense) and B (columns of a wider matrix) have them.
class OptimizerTest : public testing::Test {
 protected:
  void SetUp() override {
    at::manual_seed(5);
    int64_t offset = 0;
    for (const int64_t size : sizes_) {
      spans_.push_back({offset, size});
      offset += size;
    }
    total_ = offset;
    master_ = at::randn({total_}, at::kFloat);
  }

  FlatParameters Parameters(int64_t begin, int64_t end) {
    FlatParameters p;
    p.master = master_.to(OnGpu(at::kFloat));
    p.gradient = at::zeros({total_}, OnGpu(at::kFloat));
    p.spans = spans_;
    a_ = at::zeros({16, 256}, OnGpu(at::kBFloat16));
    b_ = at::zeros({300, 40}, OnGpu(at::kBFloat16));
    p.copies.push_back({0, a_, 1.0});
    p.copies.push_back({2, b_.narrow(1, 17, 16), 2.0});
    p.begin = begin;
    p.end = end;
    return p;
  }

  const std::vector<int64_t> sizes_ = {16 * 256, 5, 300 * 16, 1, 40961};
  std::vector<FlatSpan> spans_;
  int64_t total_ = 0;
  at::Tensor master_, a_, b_;
};

TEST_F(OptimizerTest, AdamWHasTheBitsOfTheCpuAndWritesTheComputeCopies) {
  const AdamWOptions options{0.9, 0.999, 1e-8, 0.01};
  at::Tensor host = master_.clone(), gradient = at::zeros({total_}, at::kFloat);
  std::vector<ParameterSpan> spans;
  for (const FlatSpan& s : spans_) spans.push_back({"p", host.data_ptr<float>() + s.offset, gradient.data_ptr<float>() + s.offset, s.size});
  AdamW cpu(options, spans, 0, total_);
  FlatParameters p = Parameters(0, total_);
  const auto gpu = Gpu().MakeOptimizer(p);
  for (int step = 1; step <= 4; ++step) {
    gradient.copy_(at::randn({total_}, at::kFloat));
    p.gradient.copy_(gradient);
    cpu.Step(step, 1e-3 / step, 0.37);
    gpu->Step(options, step, 1e-3 / step, 0.37);
  }
  EXPECT_TRUE(at::equal(p.master.to(at::kCPU), host));
  EXPECT_TRUE(std::equal(cpu.exp_avg().begin(), cpu.exp_avg().end(), gpu->exp_avg().to(at::kCPU).data_ptr<float>()));
  EXPECT_TRUE(std::equal(cpu.exp_avg_sq().begin(), cpu.exp_avg_sq().end(), gpu->exp_avg_sq().to(at::kCPU).data_ptr<float>()));
  const at::Tensor a = host.narrow(0, 0, 16 * 256).view({16, 256}), b = host.narrow(0, spans_[2].offset, 4800).view({300, 16});
  EXPECT_TRUE(at::equal(a_.to(at::kCPU), a.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(b_.narrow(1, 17, 16).to(at::kCPU), (b * 2.0).to(at::kBFloat16)));
  EXPECT_EQ(b_.narrow(1, 0, 17).abs().max().item<float>(), 0.0f);  // its neighbours are not touched
  EXPECT_EQ(b_.narrow(1, 33, 7).abs().max().item<float>(), 0.0f);
}

TEST_F(OptimizerTest, ShardsTogetherAreTheWhole) {
  const AdamWOptions options;
  const at::Tensor gradient = at::randn({total_}, OnGpu(at::kFloat));
  FlatParameters whole = Parameters(0, total_);
  whole.gradient.copy_(gradient);
  Gpu().MakeOptimizer(whole)->Step(options, 1, 1e-3, 1.0);
  const at::Tensor a = a_, b = b_;
  FlatParameters shard = Parameters(0, total_ / 3);
  shard.gradient.copy_(gradient);
  const auto first = Gpu().MakeOptimizer(shard);
  shard.begin = shard.end;
  shard.end = total_;
  const auto second = Gpu().MakeOptimizer(shard);
  first->Step(options, 1, 1e-3, 1.0);
  second->Step(options, 1, 1e-3, 1.0);
  EXPECT_TRUE(at::equal(shard.master, whole.master));
  EXPECT_TRUE(at::equal(a_, a) && at::equal(b_, b));
  a_.zero_();
  b_.zero_();
  first->WriteCopies();
  EXPECT_TRUE(at::equal(a_, a) && at::equal(b_, b));
}

TEST_F(OptimizerTest, GradientSquaresByParameter) {
  FlatParameters p = Parameters(0, total_);
  const at::Tensor gradient = at::randn({total_}, at::kFloat);
  p.gradient.copy_(gradient);
  const auto optimizer = Gpu().MakeOptimizer(p);
  const at::Tensor squares = optimizer->GradientSquares().to(at::kCPU);
  for (size_t i = 0; i < spans_.size(); ++i) {
    const double want = SumOfSquares(gradient.data_ptr<float>() + spans_[i].offset, spans_[i].size);
    EXPECT_NEAR(squares[static_cast<int64_t>(i)].item<double>(), want, 1e-12 * want);
  }
  EXPECT_TRUE(at::equal(optimizer->GradientSquares().to(at::kCPU), squares));
  p.gradient[spans_[4].offset + 40000] = std::numeric_limits<float>::infinity();
  p.gradient[spans_[2].offset] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor damaged = optimizer->GradientSquares().to(at::kCPU);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(std::isfinite(damaged[i].item<double>()), i != 2 && i != 4);
}

// Gradients that are shared out: each part alone, the moments and the masters as with the whole.
TEST_F(OptimizerTest, AShardsOwnGradientIsEnough) {
  const AdamWOptions options;
  const at::Tensor gradient = at::randn({total_}, OnGpu(at::kFloat));
  FlatParameters whole = Parameters(0, total_);
  whole.gradient.copy_(gradient);
  const auto all = Gpu().MakeOptimizer(whole);
  const at::Tensor squares = all->GradientSquares().to(at::kCPU);
  all->Step(options, 1, 1e-3, 0.5);
  FlatParameters parts = Parameters(0, 0);
  const at::Tensor together = at::zeros({squares.numel()}, at::kDouble);
  for (const auto& [begin, end] : {std::make_pair(int64_t{0}, total_ / 3), std::make_pair(total_ / 3, total_)}) {
    parts.begin = begin;
    parts.end = end;
    parts.gradient = gradient.narrow(0, begin, end - begin).clone();
    const auto part = Gpu().MakeOptimizer(parts);
    together.add_(part->GradientSquares().to(at::kCPU));
    part->Step(options, 1, 1e-3, 0.5);
    EXPECT_TRUE(at::equal(part->exp_avg(), all->exp_avg().narrow(0, begin, end - begin)));
  }
  EXPECT_TRUE(at::equal(parts.master, whole.master));
  for (int64_t i = 0; i < squares.numel(); ++i) EXPECT_NEAR(together[i].item<double>(), squares[i].item<double>(), 1e-12 * squares[i].item<double>());
}

TEST(CudaRuntimeTest, MemoryIsCounted) {
  Gpu().ResetPeakMemory(0);
  const int64_t before = Gpu().Memory(0).allocated_bytes;
  { const at::Tensor block = at::empty({64 << 20}, OnGpu(at::kByte)); }
  const CudaMemory memory = Gpu().Memory(0);
  EXPECT_GE(memory.peak_allocated_bytes, before + (64 << 20));
  EXPECT_EQ(memory.allocated_bytes, before);
  EXPECT_GT(memory.device_free_bytes, 0);
  EXPECT_THROW(at::empty({memory.device_bytes * 2}, OnGpu(at::kByte)), c10::OutOfMemoryError);
}

TEST(CudaRuntimeTest, WrongTensorsAreRefused) {
  Kernels& kernels = Gpu().KernelsOf(0);
  const at::Tensor x = at::zeros({4, 16}, OnGpu(at::kBFloat16)), host = at::zeros({4, 16}, at::kBFloat16), wide = at::zeros({4, 32}, OnGpu(at::kBFloat16));
  EXPECT_THROW(kernels.SwiGlu(wide, host), c10::Error);
  EXPECT_THROW(kernels.SwiGlu(x, x), c10::Error);
  EXPECT_THROW(kernels.SwiGlu(wide.to(at::kDouble), x.to(at::kDouble)), c10::Error);
  EXPECT_THROW(kernels.SwiGlu(wide, x.t().contiguous().t()), c10::Error);
}

}  // namespace
}  // namespace ppft::trainer
