#include "worker/trainer/cuda/product_tuner.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <vector>

#include "worker/trainer/kernels/cuda/launch.h"

namespace ppft::trainer::cuda {
namespace {

// Below that a product is over before its launch.
constexpr double kLeastFlops = 5e10;
constexpr int kCandidates = 8;
constexpr int kRounds = 4;
// A cold device runs at clocks that it does not keep: it is warmed up for so long where nothing was tuned a moment ago.
constexpr float kHeatMilliseconds = 80;
constexpr std::chrono::seconds kCold(1);
// Another algorithm than the first has to gain so much.
constexpr double kWorth = 0.99;
// So much slower than the fastest in the rounds so far, and an algorithm has lost.
constexpr double kMayWin = 1.04;
constexpr size_t kMostProducts = 2048;

// cublasLt.h in small: the types and numbers of its stable interface.
using Algorithm = std::array<uint64_t, 8>;
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);
constexpr int kComputeFloat = 68, kTypeFloat = 0, kTypeHalf = 2, kTypeBFloat16 = 14;
constexpr int kDescTransposeA = 3, kPreferenceWorkspace = 1;
constexpr int kConfiguration[] = {0, 1, 4, 5, 6};  // id, tile, swizzling, custom option, stages: 4 bytes each
constexpr int kClusterShape = 8;                   // 2 bytes

void CheckLt(int status, const char* what) { TORCH_CHECK(status == 0, what, ": cuBLASLt status ", status); }

int64_t RoundRows(int64_t rows) { return (rows + 1023) / 1024 * 1024; }

}  // namespace

struct ProductTuner::Library {
  explicit Library(void* handle) {
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
      complete = complete && function != nullptr;
    };
    find(create, "cublasLtCreate");
    find(desc_create, "cublasLtMatmulDescCreate");
    find(desc_set, "cublasLtMatmulDescSetAttribute");
    find(desc_destroy, "cublasLtMatmulDescDestroy");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
    find(get_configuration, "cublasLtMatmulAlgoConfigGetAttribute");
    if (!complete) return;
    CheckLt(create(&lt), "cublasLtCreate");
    CheckLt(preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    const uint64_t none = 0;
    CheckLt(preference_set(preference, kPreferenceWorkspace, &none, sizeof(none)), "cublasLtMatmulPreferenceSetAttribute");
  }

  bool complete = true;
  void* lt = nullptr;
  void* preference = nullptr;  // algorithms without a workspace

  int (*create)(void**);
  int (*desc_create)(void**, int, int);
  int (*desc_set)(void*, int, const void*, size_t);
  int (*desc_destroy)(void*);
  int (*layout_create)(void**, int, uint64_t, uint64_t, int64_t);
  int (*layout_destroy)(void*);
  int (*preference_create)(void**);
  int (*preference_set)(void*, int, const void*, size_t);
  int (*heuristic)(void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*);
  int (*matmul)(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*, const Algorithm*, void*,
                size_t, cudaStream_t);
  int (*get_configuration)(const Algorithm*, int, void*, size_t, size_t*);
};

// cuBLAS counts by columns: out^T = b^T a^T.
struct ProductTuner::Product {
  Product(Library& library, int type, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) : library(library) {
    CheckLt(library.desc_create(&desc, kComputeFloat, kTypeFloat), "cublasLtMatmulDescCreate");
    const bool transposed = b.stride(1) != 1;
    const int32_t transpose = transposed ? 1 : 0;
    CheckLt(library.desc_set(desc, kDescTransposeA, &transpose, sizeof(transpose)), "cublasLtMatmulDescSetAttribute");
    const auto layout = [&](void** to, int64_t rows, int64_t columns, int64_t stride) {
      CheckLt(library.layout_create(to, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), stride), "cublasLtMatrixLayoutCreate");
    };
    layout(&b_layout, b.size(transposed ? 0 : 1), b.size(transposed ? 1 : 0), b.stride(transposed ? 1 : 0));
    layout(&a_layout, a.size(1), a.size(0), a.stride(0));
    layout(&out_layout, out.size(1), out.size(0), out.stride(0));
  }
  ~Product() {
    for (void* layout : {a_layout, b_layout, out_layout}) library.layout_destroy(layout);
    library.desc_destroy(desc);
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  void Launch(const Algorithm& with, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, cudaStream_t stream) const {
    const float one = 1.0f, zero = 0.0f;
    CheckLt(library.matmul(library.lt, desc, &one, b.data_ptr(), b_layout, a.data_ptr(), a_layout, &zero, out.data_ptr(), out_layout, out.data_ptr(),
                           out_layout, &with, nullptr, 0, stream),
            "cublasLtMatmul");
  }
  int Candidates(Heuristic (&found)[kCandidates]) const {
    int count = 0;
    const int status = library.heuristic(library.lt, desc, b_layout, a_layout, out_layout, out_layout, library.preference, kCandidates, found, &count);
    return status == 0 ? count : 0;
  }
  Configuration ConfigurationOf(const Algorithm& of) const {
    Configuration configuration = {};
    size_t written = 0;
    for (size_t i = 0; i < std::size(kConfiguration); ++i) library.get_configuration(&of, kConfiguration[i], &configuration[i], sizeof(uint32_t), &written);
    uint16_t cluster = 0;
    library.get_configuration(&of, kClusterShape, &cluster, sizeof(cluster), &written);
    configuration.back() = cluster;
    return configuration;
  }

  Library& library;
  void* desc = nullptr;
  void* a_layout = nullptr;
  void* b_layout = nullptr;
  void* out_layout = nullptr;
  bool serves = false;
  Algorithm algorithm = {};
};

ProductTuner::ProductTuner() {
  void* const handle = dlopen("libcublasLt.so.13", RTLD_NOW);  // LibTorch's, which is loaded
  if (handle == nullptr) return;
  library_ = std::make_unique<Library>(handle);
  if (!library_->complete) library_ = nullptr;
}

ProductTuner::~ProductTuner() = default;

bool ProductTuner::Run(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const double flops = 2.0 * static_cast<double>(a.size(0)) * static_cast<double>(a.size(1)) * static_cast<double>(b.size(1));
  if (library_ == nullptr || flops < kLeastFlops || a.stride(1) != 1 || out.stride(1) != 1 || (b.stride(0) != 1 && b.stride(1) != 1)) return false;
  Product* const product = Find(a, b, out);
  if (product == nullptr || !product->serves) return false;
  product->Launch(product->algorithm, a, b, out, c10::cuda::getCurrentCUDAStream());
  return true;
}

ProductTuner::Product* ProductTuner::Find(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const at::ScalarType scalar = a.scalar_type();
  if ((scalar != at::kBFloat16 && scalar != at::kHalf) || b.scalar_type() != scalar || out.scalar_type() != scalar) return nullptr;
  // Algorithms count on the alignment that they were chosen for.
  for (const at::Tensor* t : {&a, &b, &out}) {
    if (reinterpret_cast<uintptr_t>(t->data_ptr()) % 256 != 0) return nullptr;
    if (std::max(t->stride(0), t->stride(1)) % 8 != 0) return nullptr;
  }
  const bool transposed = b.stride(1) != 1;
  const int type = scalar == at::kHalf ? kTypeHalf : kTypeBFloat16;
  Key key = {type, transposed, a.size(0), a.size(1), b.size(1), a.stride(0), b.stride(transposed ? 1 : 0), out.stride(0)};
  if (const auto found = products_.find(key); found != products_.end()) return found->second.get();

  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  Check(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(), &capturing), "cudaStreamIsCapturing");
  Key rounded = key;
  rounded[2] = RoundRows(a.size(0));
  const auto known = tuned_.find(rounded);
  if (known == tuned_.end() && capturing != cudaStreamCaptureStatusNone) return nullptr;
  if (products_.size() >= kMostProducts) products_.clear();
  std::unique_ptr<Product>& product = products_[key];
  product = std::make_unique<Product>(*library_, type, a, b, out);
  if (known != tuned_.end()) {
    // An algorithm belongs to its shape: the candidate for this one that is made in the same way.
    Heuristic found[kCandidates] = {};
    const int count = product->Candidates(found);
    for (int i = count - 1; i >= 0; --i) {
      if (i == 0 || product->ConfigurationOf(found[i].algorithm) == known->second) product->algorithm = found[i].algorithm;
      if (product->ConfigurationOf(found[i].algorithm) == known->second) break;
    }
    product->serves = count > 0;
  } else {
    Tune(*product, a, b, out);
    if (product->serves) tuned_[rounded] = product->ConfigurationOf(product->algorithm);
  }
  return product.get();
}

void ProductTuner::Heat(const Product& product, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < std::chrono::duration<float, std::milli>(kHeatMilliseconds)) {
    for (int i = 0; i < 4; ++i) product.Launch(product.algorithm, a, b, out, stream);
    Check(cudaStreamSynchronize(stream), "a product");
  }
}

// All candidates in turn, some rounds of it: they meet the same clocks. After the first round only those go on that may still win.
void ProductTuner::Tune(Product& product, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  Heuristic found[kCandidates] = {};
  const int count = product.Candidates(found);
  if (count == 0) return;
  product.algorithm = found[0].algorithm;
  if (std::chrono::steady_clock::now() - tuned_at_ > kCold) Heat(product, a, b, out);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  std::vector<cudaEvent_t> events(static_cast<size_t>(count) + 1);
  for (cudaEvent_t& event : events) Check(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < count; ++i) product.Launch(found[i].algorithm, a, b, out, stream);  // loads the kernels
  std::vector<int> left(static_cast<size_t>(count));
  std::iota(left.begin(), left.end(), 0);
  std::vector<double> milliseconds(left.size(), 0.0);  // of the rounds so far
  const auto fastest = [&] { return *std::min_element(left.begin(), left.end(), [&](int x, int y) { return milliseconds[x] < milliseconds[y]; }); };
  for (int round = 0; round < kRounds; ++round) {
    Check(cudaEventRecord(events[0], stream), "cudaEventRecord");
    for (size_t i = 0; i < left.size(); ++i) {
      product.Launch(found[left[i]].algorithm, a, b, out, stream);
      Check(cudaEventRecord(events[i + 1], stream), "cudaEventRecord");
    }
    Check(cudaStreamSynchronize(stream), "a product");
    for (size_t i = 0; i < left.size(); ++i) {
      float elapsed = 0;
      Check(cudaEventElapsedTime(&elapsed, events[i], events[i + 1]), "cudaEventElapsedTime");
      milliseconds[left[i]] += elapsed;
    }
    const double most = kMayWin * milliseconds[fastest()];
    // The first is what the others are measured against.
    std::erase_if(left, [&](int i) { return i > 0 && milliseconds[i] > most; });
  }
  for (const cudaEvent_t event : events) cudaEventDestroy(event);
  const int best = fastest();
  product.algorithm = found[milliseconds[best] < kWorth * milliseconds[0] ? best : 0].algorithm;
  product.serves = true;
  tuned_at_ = std::chrono::steady_clock::now();
}

}  // namespace ppft::trainer::cuda
