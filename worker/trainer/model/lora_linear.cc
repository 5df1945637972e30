#include "worker/trainer/model/lora_linear.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <utility>

namespace ppft::trainer {
LoraLinear::LoraLinear(int64_t in, const LoraOptions& lora, std::vector<LoraModule> modules, const at::TensorOptions& compute, bool resident, bool room,
                       Kernels& kernels)
    : in_(in), r_(lora.r), scale_(lora.scale), compute_(compute), resident_(resident), kernels_(kernels), modules_(std::move(modules)) {
  for (const LoraModule& module : modules_) {
    out_ += module.out;
    if (module.adapted) lora_columns_ += r_;
  }
  // A pass over dy costs `out`, one over the gradient of x twice `in`. The compute type must differ from the masters': A is a copy.
  const bool narrow = compute_.dtype() == at::kBFloat16 || compute_.dtype() == at::kHalf;
  a_below_ = room && kernels_.wants_parts() && resident_ && narrow && lora.dropout == 0 && out_ < 2 * in_;
  if (resident_) weight_ = at::zeros({out_ + a_rows(), in_ + lora_columns_}, compute_);
}

void LoraLinear::Place(const at::Tensor& weight) {
  weight_ = weight.view({out_ + a_rows(), in_ + lora_columns_});
  WriteColumns();
}

at::Tensor LoraLinear::base_weight(size_t module) const {
  if (!weight_.defined()) return at::Tensor();
  int64_t row = 0;
  for (size_t m = 0; m < module; ++m) row += modules_[m].out;
  return weight_.narrow(0, row, modules_[module].out).narrow(1, 0, in_);
}

at::Tensor LoraLinear::Merged(size_t module, const at::Tensor& base) const {
  const LoraModule& m = modules_[module];
  const at::ScalarType acc = base.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor merged = base.to(compute_.device(), acc, /*non_blocking=*/false, /*copy=*/true);
  if (m.adapted) merged.addmm_(m.b.to(acc), m.a.to(acc), 1.0, scale_);
  return merged;
}

int64_t LoraLinear::parameter_count() const {
  int64_t count = lora_columns_ * in_;
  for (const LoraModule& m : modules_) count += m.adapted ? m.out * r_ : 0;
  return count;
}

void LoraLinear::Bind(const at::Tensor& master, const at::Tensor& gradient) {
  a_master_ = master.narrow(0, 0, lora_columns_ * in_).view({lora_columns_, in_});
  a_gradient_ = gradient.narrow(0, 0, lora_columns_ * in_).view({lora_columns_, in_});
  if (a_below_) {
    a_ = weight_.narrow(0, out_, lora_columns_).narrow(1, 0, in_);
  } else {
    a_ = master.scalar_type() == c10::typeMetaToScalarType(compute_.dtype()) ? a_master_ : at::zeros({lora_columns_, in_}, compute_);
  }
  int64_t row = 0;
  int64_t offset = lora_columns_ * in_;
  for (LoraModule& m : modules_) {
    if (!m.adapted) continue;
    m.a = a_master_.narrow(0, row, r_);
    m.a_gradient = a_gradient_.narrow(0, row, r_);
    m.b = master.narrow(0, offset, m.out * r_).view({m.out, r_});
    m.b_gradient = gradient.narrow(0, offset, m.out * r_).view({m.out, r_});
    row += r_;
    offset += m.out * r_;
  }
}

void LoraLinear::AdapterChanged() {
  if (lora_columns_ == 0) return;
  if (!a_.is_same(a_master_)) a_.copy_(a_master_);
  if (resident_) WriteColumns();
}

void LoraLinear::WriteColumns() {
  int64_t row = 0;
  int64_t column = in_;
  for (const LoraModule& m : modules_) {
    if (m.adapted) {
      weight_.narrow(0, row, m.out).narrow(1, column, r_).copy_(m.b * scale_);
      column += r_;
    }
    row += m.out;
  }
}

std::vector<ComputeCopy> LoraLinear::compute_copies(int64_t parameter) const {
  std::vector<ComputeCopy> copies;
  int64_t row = 0;
  int64_t column = 0;
  for (const LoraModule& m : modules_) {
    if (m.adapted) {
      if (!a_.is_same(a_master_)) copies.push_back({parameter, a_.narrow(0, column, r_), 1.0});
      if (resident_) copies.push_back({parameter + 1, weight_.narrow(0, row, m.out).narrow(1, in_ + column, r_), scale_});
      parameter += 2;
      column += r_;
    }
    row += m.out;
  }
  return copies;
}

void LoraLinear::Forward(const at::Tensor& x, const at::Tensor& y, const std::vector<DropoutSequence>& dropout, const at::Tensor& dropped) {
  FillColumns(x, dropout, dropped);
  kernels_.MatMul(x, columns().t(), y);
}

void LoraLinear::FillColumns(const at::Tensor& x, const std::vector<DropoutSequence>& dropout, const at::Tensor& dropped) {
  if (lora_columns_ > 0) {
    const at::Tensor input = x.narrow(1, 0, in_);
    if (dropout.empty()) {
      at::Tensor lora = x.narrow(1, in_, lora_columns_);
      at::mm_out(lora, input, a_.t());
    } else {
      int64_t column = 0;
      for (size_t i = 0; i < modules_.size(); ++i) {
        if (!modules_[i].adapted) continue;
        kernels_.Dropout(input, dropout[i], dropped);
        at::Tensor lora = x.narrow(1, in_ + column, r_);
        at::mm_out(lora, dropped, a_.narrow(0, column, r_).t());
        column += r_;
      }
    }
  }
}

at::Tensor LoraLinear::InputGradient(const at::Tensor& dy, const at::Tensor& dx, bool input_gradient, const std::vector<DropoutSequence>& dropout,
                                     const at::Tensor& dropped) {
  const at::Tensor dinput = dx.narrow(1, 0, in_);
  if (a_below_) {
    const at::Tensor wide = dy.as_strided({dy.size(0), out_ + lora_columns_}, dy.strides());
    at::Tensor d = wide.narrow(1, out_, lora_columns_);
    if (lora_columns_ > 0) at::mm_out(d, dy, columns().narrow(1, in_, lora_columns_));
    if (input_gradient) kernels_.MatMul(wide, weight_.narrow(1, 0, in_), dinput);
    return d;
  }
  at::Tensor d = dx.narrow(1, in_, lora_columns_);
  if (input_gradient) {
    kernels_.MatMul(dy, weight_, dx);
  } else if (lora_columns_ > 0) {
    at::mm_out(d, dy, weight_.narrow(1, in_, lora_columns_));
  }
  if (lora_columns_ == 0 || !input_gradient) return d;
  if (dropout.empty()) {
    dinput.addmm_(d, a_);
    return d;
  }
  int64_t column = 0;
  for (size_t i = 0; i < modules_.size(); ++i) {
    if (!modules_[i].adapted) continue;
    at::Tensor ddropped = dropped;
    at::mm_out(ddropped, d.narrow(1, column, r_), a_.narrow(0, column, r_));
    kernels_.DropoutBackward(ddropped, dropout[i], dinput);
    column += r_;
  }
  return d;
}

void LoraLinear::AdapterGradients(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& lora, const at::Tensor& d,
                                  const std::vector<DropoutSequence>& dropout, const at::Tensor& dropped, Missing missing) {
  if (lora_columns_ == 0) return;
  if (dropout.empty() && missing != Missing::kB) kernels_.AddProduct(d.t(), x, 1.0, a_gradient_);
  int64_t row = 0;
  int64_t column = 0;
  for (size_t i = 0; i < modules_.size(); ++i) {
    const LoraModule& m = modules_[i];
    if (m.adapted) {
      if (!dropout.empty() && missing != Missing::kB) {
        kernels_.Dropout(x, dropout[i], dropped);
        kernels_.AddProduct(d.narrow(1, column, r_).t(), dropped, 1.0, m.a_gradient);
      }
      if (missing != Missing::kA) kernels_.AddProduct(dy.narrow(1, row, m.out).t(), lora.narrow(1, column, r_), scale_, m.b_gradient);
      column += r_;
    }
    row += m.out;
  }
}

}  // namespace ppft::trainer
