// A frozen linear layer with LoRA (2106.09685): one or more modules that read the same input, stacked by output (q,k,v; gate,up; o; down).
//
// Augmented weight: the stored matrix is [W | s B], the scaled B of each adapted module in its own r columns (block-diagonal over the stack). With x A^T
// written into r extra columns per adapted module of the input, y = [x | x A^T] [W | s B]^T is one product, and dy [W | s B] gives the gradients
// of x (base part) and of x A^T together; the rest of x's gradient, d A with d = dy s B, is a second pass over it. On a device, where dy is narrow beside x, A
// is stored as further rows below W instead: d first, then [dy | d] [W; A] is all of x's gradient.
//
// Shapes: T = tokens, in, out = sum over the stack, R = lora_columns() = r * adapted modules. Thread: one at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "worker/trainer/kernels/kernels.h"
#include "worker/trainer/kernels/optimizer.h"
#include "worker/trainer/model/stage_model.h"

namespace ppft::trainer {

// One module of the stack.
struct LoraModule {
  std::string name;  // "model.layers.3.self_attn.q_proj"
  int index = 0;     // of model::TargetModules()
  int64_t out = 0;
  bool adapted = false;
  // Views into the stage's flat buffers, acc dtype; set by Bind. A: [r, in], B: [out, r].
  at::Tensor a, b, a_gradient, b_gradient;
};

class LoraLinear {
 public:
  // resident: the stored matrix is this object's own; otherwise it has to be placed before each use. room: the rows of dy may have columns behind them.
  LoraLinear(int64_t in, const LoraOptions& lora, std::vector<LoraModule> modules, const at::TensorOptions& compute, bool resident, bool room,
             Kernels& kernels);

  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  int64_t lora_columns() const { return lora_columns_; }
  double scale() const { return scale_; }
  const std::vector<LoraModule>& modules() const { return modules_; }

  // Elements of the stored matrix.
  int64_t weight_size() const { return (out_ + a_rows()) * (in_ + lora_columns_); }
  // Columns that a row of dy must have room for behind its `out`: Backward writes them.
  int64_t gradient_columns() const { return a_rows(); }
  // Uses `weight` ([weight_size()], contiguous) as the stored matrix from now on and writes the adapters' columns into it.
  void Place(const at::Tensor& weight);

  // The base weight of a module: view [out, in] into the stored matrix; undefined before one is placed.
  at::Tensor base_weight(size_t module) const;
  // W + s B A in fp32 (acc) from a given base weight.
  at::Tensor Merged(size_t module, const at::Tensor& base) const;

  int64_t parameter_count() const;
  // Places the adapters in `master` and `gradient` (flat, parameter_count() long): all A of the stack side by side, then the B one after another.
  void Bind(const at::Tensor& master, const at::Tensor& gradient);
  // Refreshes the compute copies after the masters changed.
  void AdapterChanged();
  // Where those copies lie while the matrix is resident; the parameters count from `parameter`: A, B of each adapted module.
  std::vector<ComputeCopy> compute_copies(int64_t parameter) const;

  // x: rows [T, in + R], the input in the first `in` columns; fills the other R. y: rows [T, out].
  // dropout: one sequence per module of the stack, or empty for none.
  void Forward(const at::Tensor& x, const at::Tensor& y, const std::vector<DropoutSequence>& dropout, const at::Tensor& dropped);
  // The first half of it: x A^T into the other R columns.
  void FillColumns(const at::Tensor& x, const std::vector<DropoutSequence>& dropout, const at::Tensor& dropped);
  // Backward in two steps, between which dx's first columns are the caller's. dy: rows [T, out] with gradient_columns() more behind them; dx: rows [T, in + R],
  // whose first `in` columns become the input's gradient (unspecified unless input_gradient). Returns d, [T, R], in dy's or dx's last columns.
  // dropped: rows [T, in], room for one dropped input; needed with dropout alone.
  at::Tensor InputGradient(const at::Tensor& dy, const at::Tensor& dx, bool input_gradient, const std::vector<DropoutSequence>& dropout,
                           const at::Tensor& dropped);
  // Which of a stack's gradients are still to be made.
  enum class Missing { kBoth, kA, kB };
  // Adds to the adapters' gradients. x: rows [T, in]; lora: rows [T, R] as Forward filled them; d: as InputGradient returned it.
  void AdapterGradients(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& lora, const at::Tensor& d, const std::vector<DropoutSequence>& dropout,
                        const at::Tensor& dropped, Missing missing = Missing::kBoth);

 private:
  // s B of each adapted module into the stored matrix.
  void WriteColumns();
  int64_t a_rows() const { return a_below_ ? lora_columns_ : 0; }
  at::Tensor columns() const { return weight_.narrow(0, 0, out_); }  // [W | s B]

  const int64_t in_;
  const int64_t r_;
  const double scale_;
  const at::TensorOptions compute_;
  const bool resident_;
  Kernels& kernels_;
  std::vector<LoraModule> modules_;
  int64_t out_ = 0;
  int64_t lora_columns_ = 0;
  bool a_below_ = false;
  at::Tensor weight_;    // [out (+ R), in + R]
  at::Tensor a_master_;  // [R, in] acc
  at::Tensor a_gradient_;
  at::Tensor a_;  // [R, in] compute: the master itself, rows of weight_, or a tensor of its own
};

}  // namespace ppft::trainer
