// The CPU's kernels: formulas against plain ATen in fp64, gradients against finite differences, narrow types, strided rows, threads.
#include "worker/trainer/kernels/kernels.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "tests/worker/trainer/numeric_gradient.h"

namespace ppft::trainer {
namespace {

constexpr double kEps = 1e-5;

class KernelsTest : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(7); }
  // [rows, columns] as a view into a wider buffer.
  static at::Tensor Strided(int64_t rows, int64_t columns, at::ScalarType type = at::kDouble) {
    return at::randn({rows, columns + 3}, at::kDouble).to(type).narrow(1, 2, columns);
  }
  static double Dot(const at::Tensor& a, const at::Tensor& b) { return (a.to(at::kDouble) * b.to(at::kDouble)).sum().item<double>(); }

  Kernels& kernels_ = CpuKernels();
};

TEST_F(KernelsTest, MatMulOfAnyRowCountAndBothOrientations) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(c10::toString(type));
    const double tolerance = type == at::kDouble ? 1e-14 : type == at::kFloat ? 2e-6 : 2e-2;
    for (const int64_t rows : {1, 15, 16, 47, 517, 1024}) {
      const at::Tensor a = Strided(rows, 37, type), weight = Strided(29, 37, type), out = Strided(rows, 29, type), back = Strided(rows, 37, type);
      kernels_.MatMul(a, weight.t(), out);
      EXPECT_LT(RelativeError(out, at::matmul(a.to(at::kDouble), weight.to(at::kDouble).t())), tolerance) << rows;
      kernels_.MatMul(out, weight, back);
      EXPECT_LT(RelativeError(back, at::matmul(out.to(at::kDouble), weight.to(at::kDouble))), tolerance) << rows;
    }
  }
}

TEST_F(KernelsTest, AddRmsNormIsTheFormula) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    SCOPED_TRACE(c10::toString(type));
    const double tolerance = type == at::kDouble ? 1e-14 : type == at::kFloat ? 1e-6 : 2e-2;
    const at::ScalarType acc = type == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor x = Strided(5, 37, type), delta = Strided(5, 37, type), weight = at::randn({37}, at::kDouble).to(type);
    const at::Tensor sum = at::empty({5, 37}, type), normed = Strided(5, 37, type), rstd = at::empty({5}, acc);
    kernels_.AddRmsNorm(x, delta, weight, kEps, sum, normed, rstd);
    const at::Tensor want_sum = x.to(at::kDouble) + delta.to(at::kDouble);
    const at::Tensor want_rstd = at::rsqrt(want_sum.square().mean(-1) + kEps);
    EXPECT_LT(RelativeError(sum, want_sum), tolerance);
    EXPECT_LT(RelativeError(rstd, want_rstd), tolerance);
    EXPECT_LT(RelativeError(normed, want_sum * want_rstd.unsqueeze(1) * weight.to(at::kDouble)), tolerance);
    const at::Tensor again = at::empty({5, 37}, type);
    kernels_.ApplyRmsNorm(sum, rstd, weight, again);
    EXPECT_TRUE(at::equal(again, normed.contiguous()));
  }
}

TEST_F(KernelsTest, RmsNormBackwardAddsTheGradient) {
  const at::Tensor x = Strided(4, 19), weight = at::randn({19}, at::kDouble), dnormed = Strided(4, 19);
  const at::Tensor normed = at::empty({4, 19}, at::kDouble), rstd = at::empty({4}, at::kDouble);
  const auto f = [&] {
    kernels_.AddRmsNorm(x, at::Tensor(), weight, kEps, at::Tensor(), normed, rstd);
    return Dot(normed, dnormed);
  };
  const at::Tensor numeric = NumericGradient(x, f);
  f();
  const at::Tensor before = Strided(4, 19), dx = before.clone();
  kernels_.RmsNormBackward(dnormed, x, rstd, weight, dx);
  EXPECT_LT(RelativeError(dx - before, numeric), 1e-8);
}

TEST_F(KernelsTest, RopeRotatesPairsOfHalvesAndItsInverseTurnsBack) {
  const HeadLayout heads{3, 2, 8};
  const at::Tensor qkv = Strided(6, heads.row_size());
  const at::Tensor before = qkv.clone();
  const at::Tensor angle = at::outer(at::arange(10, at::kDouble), at::tensor({1.0, 0.3, 0.1, 0.02}, at::kDouble));
  const at::Tensor cos = angle.cos(), sin = angle.sin(), position = at::tensor({0, 1, 2, 3, 0, 9}, at::kInt);
  kernels_.Rope(qkv, heads, cos, sin, position, false);
  // Complex numbers: first half + i * second half, times e^(i angle).
  const at::Tensor h = before.narrow(1, 0, 40).contiguous().view({6, 5, 2, 4});
  const at::Tensor c = cos.index_select(0, position).unsqueeze(1), s = sin.index_select(0, position).unsqueeze(1);
  const at::Tensor want = at::stack({h.select(2, 0) * c - h.select(2, 1) * s, h.select(2, 1) * c + h.select(2, 0) * s}, 2).reshape({6, 40});
  EXPECT_LT(RelativeError(qkv.narrow(1, 0, 40), want), 1e-14);
  EXPECT_TRUE(at::equal(qkv.narrow(1, 40, 16), before.narrow(1, 40, 16)));  // v is not touched
  kernels_.Rope(qkv, heads, cos, sin, position, true);
  EXPECT_LT(RelativeError(qkv, before), 1e-14);
  EXPECT_THROW(kernels_.Rope(qkv, heads, cos, sin, at::tensor({0, 1, 2, 3, 4, 10}, at::kInt), false), c10::Error);
}

TEST_F(KernelsTest, SwiGluAndItsGradient) {
  const at::Tensor gate_up = at::randn({3, 2 * 21}, at::kDouble) * 3, dout = Strided(3, 21), out = Strided(3, 21);
  const auto f = [&] {
    kernels_.SwiGlu(gate_up, out);
    return Dot(out, dout);
  };
  f();
  EXPECT_LT(RelativeError(out, at::silu(gate_up.narrow(1, 0, 21)) * gate_up.narrow(1, 21, 21)), 1e-14);
  const at::Tensor numeric = NumericGradient(gate_up, f);
  const at::Tensor separate = at::empty_like(gate_up), in_place = gate_up.clone();
  kernels_.SwiGluBackward(dout, gate_up, separate);
  kernels_.SwiGluBackward(dout, in_place, in_place);
  EXPECT_LT(RelativeError(separate, numeric), 1e-8);
  EXPECT_TRUE(at::equal(separate, in_place));
}

TEST_F(KernelsTest, SwiGluOfFloatsIsRightForEverySizeOfGate) {
  const at::Tensor gate = at::linspace(-100, 100, 4001, at::kFloat), gate_up = at::cat({gate, at::ones({4001}, at::kFloat)}).view({1, -1});
  const at::Tensor out = at::empty({1, 4001}, at::kFloat);
  kernels_.SwiGlu(gate_up, out);
  const at::Tensor want = at::silu(gate.to(at::kDouble));
  EXPECT_LT((out[0].to(at::kDouble) - want).abs().div(want.abs() + 1e-30).max().item<double>(), 1e-4);  // far left the result is below 1e-36
  EXPECT_LT(((out[0].to(at::kDouble) - want).abs() / (want.abs() + 1e-6)).max().item<double>(), 5e-7);
}

at::Tensor PlainAttention(const at::Tensor& qkv, const HeadLayout& heads, const std::vector<int32_t>& cu) {
  std::vector<at::Tensor> documents;
  for (size_t i = 0; i + 1 < cu.size(); ++i) {
    const int64_t n = cu[i + 1] - cu[i];
    if (n == 0) continue;
    const at::Tensor rows = qkv.narrow(0, cu[i], n);
    std::vector<at::Tensor> out;
    for (int64_t h = 0; h < heads.q_heads; ++h) {
      const int64_t kv = h / (heads.q_heads / heads.kv_heads);
      const at::Tensor q = rows.narrow(1, h * heads.head_dim, heads.head_dim);
      const at::Tensor k = rows.narrow(1, heads.q_size() + kv * heads.head_dim, heads.head_dim);
      const at::Tensor v = rows.narrow(1, heads.q_size() + heads.kv_size() + kv * heads.head_dim, heads.head_dim);
      const at::Tensor future = at::ones({n, n}, at::kBool).triu(1);
      const at::Tensor scores = (at::matmul(q, k.t()) / std::sqrt(double(heads.head_dim))).masked_fill(future, -INFINITY);
      out.push_back(at::matmul(at::softmax(scores, -1), v));
    }
    documents.push_back(at::cat(out, 1));
  }
  return at::cat(documents, 0);
}

TEST_F(KernelsTest, AttentionStaysInsideDocumentsAndItsGradientIsRight) {
  const HeadLayout heads{4, 2, 6};
  for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 11}, {0, 3, 6, 9, 11}, {0, 1, 5, 5, 9, 11}}) {
    const at::Tensor qkv = Strided(11, heads.row_size()), dout = Strided(11, heads.q_size()), out = Strided(11, heads.q_size());
    const at::Tensor lse = at::empty({4, 11}, at::kDouble);
    const auto f = [&] {
      kernels_.Attention(qkv, heads, cu, out, lse);
      return Dot(out, dout);
    };
    f();
    EXPECT_LT(RelativeError(out, PlainAttention(qkv, heads, cu)), 1e-12);
    const at::Tensor numeric = NumericGradient(qkv, f);
    f();
    const at::Tensor dqkv = at::empty({11, heads.row_size()}, at::kDouble);
    kernels_.AttentionBackward(dout, qkv, heads, cu, out, lse, dqkv);
    EXPECT_LT(RelativeError(dqkv, numeric), 1e-8);
  }
}

TEST_F(KernelsTest, CrossEntropyLossAndGradient) {
  const at::Tensor logits = at::randn({5, 1100}, at::kDouble) * 4, targets = at::randint(1100, {5}, at::kLong);
  const auto loss_of = [&](const at::Tensor& values) {
    const at::Tensor sum = at::zeros({1}, at::kDouble), scratch = values.clone();
    kernels_.CrossEntropy(scratch, targets, 1.0, false, sum);
    return sum.item<double>();
  };
  const at::Tensor want = -at::log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).sum();
  EXPECT_NEAR(loss_of(logits), want.item<double>(), 1e-10);
  EXPECT_NEAR(loss_of(logits + 1e4), want.item<double>(), 1e-7);  // no overflow
  EXPECT_NEAR(loss_of(logits.to(at::kFloat)), want.item<double>(), 1e-4);

  const at::Tensor part = logits.narrow(1, 0, 40), few = at::randint(40, {5}, at::kLong);
  const auto f = [&] {
    const at::Tensor sum = at::zeros({1}, at::kDouble), scratch = part.contiguous();
    kernels_.CrossEntropy(scratch, few, 1.0, false, sum);
    return 0.25 * sum.item<double>();
  };
  const at::Tensor numeric = NumericGradient(part, f), gradient = part.clone(), sum = at::ones({1}, at::kDouble);
  const double loss = f();
  kernels_.CrossEntropy(gradient, few, 0.25, true, sum);
  EXPECT_NEAR(0.25 * (sum.item<double>() - 1.0), loss, 1e-12);  // adds
  EXPECT_LT(RelativeError(gradient, numeric), 1e-8);
  EXPECT_THROW(kernels_.CrossEntropy(logits, at::tensor({0, 1, 2, 3, 1100}, at::kLong), 1.0, false, sum), c10::Error);
}

TEST_F(KernelsTest, DropoutKeepsItsShareAndBackwardUsesTheSameMask) {
  const DropoutSequence sequence{{1, 2}, 3, 0.25};
  const at::Tensor x = at::ones({100, 402}, at::kDouble), out = at::empty_like(x);
  kernels_.Dropout(x, sequence, out);
  const at::Tensor kept = out.ne(0);
  EXPECT_NEAR(kept.to(at::kDouble).mean().item<double>(), 0.75, 0.01);
  EXPECT_TRUE(at::equal(out.masked_select(kept), (x / 0.75).masked_select(kept)));
  const at::Tensor dout = at::randn({100, 402}, at::kDouble), dx = at::ones_like(x);
  kernels_.DropoutBackward(dout, sequence, dx);
  EXPECT_LT(RelativeError(dx, 1 + dout * out), 1e-14);
  // A row's numbers belong to the row: a part of the rows draws the same, another stream does not.
  const at::Tensor part = at::empty({10, 402}, at::kDouble), other = at::empty_like(x);
  kernels_.Dropout(x.narrow(0, 0, 10), sequence, part);
  EXPECT_TRUE(at::equal(part, out.narrow(0, 0, 10)));
  kernels_.Dropout(x, {{1, 2}, 4, 0.25}, other);
  EXPECT_FALSE(at::equal(other, out));
  // Told what its rows draw as: rows 90 to 99 of this sequence first, then the first ten.
  std::vector<int32_t> drawn;
  for (int32_t row = 0; row < 20; ++row) drawn.insert(drawn.end(), {1, 2, row < 10 ? 90 + row : row - 10, 0});
  const DropoutSequence told{{7, 8}, 3, 0.25, at::tensor(drawn, at::kInt).view({20, 4})};
  const at::Tensor both = at::empty({20, 402}, at::kDouble), gradient = at::ones({20, 402}, at::kDouble);
  kernels_.Dropout(x.narrow(0, 0, 20), told, both);
  kernels_.DropoutBackward(dout.narrow(0, 0, 20), told, gradient);
  EXPECT_TRUE(at::equal(both, at::cat({out.narrow(0, 90, 10), out.narrow(0, 0, 10)})));
  EXPECT_LT(RelativeError(gradient, 1 + dout.narrow(0, 0, 20) * both), 1e-14);
  EXPECT_THROW(kernels_.Dropout(x, told, other), c10::Error);
}

TEST_F(KernelsTest, ThreadsDoNotChangeTheBits) {
  const HeadLayout heads{4, 2, 16};
  const std::vector<int32_t> cu = {0, 200, 400, 517};
  const at::Tensor qkv = at::randn({517, heads.row_size()}, at::kFloat), dout = at::randn({517, heads.q_size()}, at::kFloat);
  const at::Tensor logits = at::randn({64, 3000}, at::kFloat), targets = at::randint(3000, {64}, at::kLong);
  const at::Tensor weight = at::randn({96, heads.row_size()}, at::kFloat);
  const auto run = [&](int threads) {
    at::set_num_threads(threads);
    const at::Tensor product = at::empty({512, 96}, at::kFloat);
    kernels_.MatMul(qkv.narrow(0, 0, 512), weight.t(), product);
    const at::Tensor out = at::empty({517, heads.q_size()}, at::kFloat), lse = at::empty({4, 517}, at::kFloat), dqkv = at::empty_like(qkv);
    kernels_.Attention(qkv, heads, cu, out, lse);
    kernels_.AttentionBackward(dout, qkv, heads, cu, out, lse, dqkv);
    const at::Tensor gradient = logits.clone(), sum = at::zeros({1}, at::kDouble);
    kernels_.CrossEntropy(gradient, targets, 0.5, true, sum);
    return at::cat({product.flatten(), out.flatten(), dqkv.flatten(), gradient.flatten(), sum.to(at::kFloat)});
  };
  const at::Tensor one = run(1);
  EXPECT_TRUE(at::equal(one, run(2)));
  EXPECT_TRUE(at::equal(one, run(3)));
}

}  // namespace
}  // namespace ppft::trainer
