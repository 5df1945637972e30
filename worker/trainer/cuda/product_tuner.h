// Large matrix products by cuBLASLt, each shape with the algorithm that was the fastest of those that cuBLASLt proposes when the shape came first: its own
// first choice is some per cent slower on many. The results of different algorithms differ in their last bits, so that deterministic mode does without.
//
// Thread: one at a time. Works on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>

namespace ppft::trainer::cuda {

class ProductTuner {
 public:
  ProductTuner();
  ~ProductTuner();
  ProductTuner(const ProductTuner&) = delete;
  ProductTuner& operator=(const ProductTuner&) = delete;

  // out = a b as in Kernels::MatMul; false where it is not for this class (small, other types, a stream that is being captured before the shape is known), and
  // nothing was done.
  bool Run(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);

 private:
  struct Library;
  struct Product;
  using Key = std::array<int64_t, 8>;
  using Configuration = std::array<uint32_t, 6>;  // what an algorithm is made of, but for the shape

  Product* Find(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);
  void Tune(Product& product, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);
  void Heat(const Product& product, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out);

  std::unique_ptr<Library> library_;    // null: cuBLASLt was not found
  std::map<Key, Configuration> tuned_;  // by rounded shape
  std::chrono::steady_clock::time_point tuned_at_;
  std::map<Key, std::unique_ptr<Product>> products_;
};

}  // namespace ppft::trainer::cuda
