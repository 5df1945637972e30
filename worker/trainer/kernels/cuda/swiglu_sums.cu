// SwiGLU's backward pass with the adapters' sums over its rows: the gradients of gate and up and SwiGLU's output meet the adapters' columns while they are on
// the chip, by tensor cores, and none of the three is read again.
//
// A block owns 64 columns and a run of rows, 64 at a time. Its sums (fp32) go to a buffer of partial sums, one part for each half of the rows at a time; a
// second kernel adds the parts in their order.
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows and columns
constexpr int kRank = 16;   // of the adapters
constexpr int kHalves = 2;  // of a tile's rows: four warps each
constexpr int kMostRuns = 8;
constexpr int kLeastTiles = 16;  // of a run
constexpr int kPadding = 8;      // elements between rows: no two of a matrix's eight rows in one bank

template <typename T>
using Vector8 = Vector<T, 8>;

template <typename T>
__device__ __forceinline__ float Sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

// Four 8 x 8 matrices, transposed; lane l gives the address of row l % 8 of matrix l / 8.
template <typename T>
__device__ __forceinline__ void LoadTransposed(const T* row, uint32_t (&out)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void MultiplyAdd(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void MultiplyAdd(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// partial: [runs * kHalves][3][columns][kRank]: sums of dgate x lora's first columns, of dup x its second, of SwiGLU's output x d.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    SwiGluBackwardSumsKernel(Rows<T> dout, Rows<T> gate_up, Rows<T> lora, Rows<T> d, float* partial, int rows, int columns, int rows_of_run) {
  __shared__ __align__(16) T s_terms[3][kTile][kTile + kPadding];
  __shared__ __align__(16) T s_lora[kTile][2 * kRank + kPadding];
  __shared__ __align__(16) T s_d[kTile][kRank + kPadding];
  const int strip = blockIdx.x * kTile, begin = blockIdx.y * rows_of_run, end = min(rows, begin + rows_of_run);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp % 4 * 16, half = warp / 4;
  const int row_in_tile = threadIdx.x / 8, column = strip + threadIdx.x % 8 * 8;  // of the thread's first vector; the second lies 32 rows below
  const Vector8<T> zero = {};

  float sums[3][2][4] = {};
  Vector8<T> gate[2], up[2], gradient[2], lora_part, d_part;
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile + row_in_tile + 32 * i;
      gate[i] = row < end ? Vector8<T>::Load(gate_up[row] + column) : zero;
      up[i] = row < end ? Vector8<T>::Load(gate_up[row] + columns + column) : zero;
      gradient[i] = row < end ? Vector8<T>::Load(dout[row] + column) : zero;
    }
    const int lora_row = tile + threadIdx.x / 4, d_row = tile + threadIdx.x / 2;
    lora_part = lora_row < end ? Vector8<T>::Load(lora[lora_row] + threadIdx.x % 4 * 8) : zero;
    d_part = threadIdx.x < 2 * kTile && d_row < end ? Vector8<T>::Load(d[d_row] + threadIdx.x % 2 * 8) : zero;
  };
  fetch(begin);
  for (int tile = begin; tile < end; tile += kTile) {
    __syncthreads();  // the products of the tile before have read theirs
    *reinterpret_cast<Vector8<T>*>(&s_lora[threadIdx.x / 4][threadIdx.x % 4 * 8]) = lora_part;
    if (threadIdx.x < 2 * kTile) *reinterpret_cast<Vector8<T>*>(&s_d[threadIdx.x / 2][threadIdx.x % 2 * 8]) = d_part;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Vector8<T> out;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float g = ToFloat(gate[i].at[j]), u = ToFloat(up[i].at[j]), dy = ToFloat(gradient[i].at[j]), s = Sigmoid<T>(g);
        out.at[j] = FromFloat<T>(g * s * u);
        gate[i].at[j] = FromFloat<T>(dy * u * s * (1.0f + g * (1.0f - s)));
        up[i].at[j] = FromFloat<T>(dy * g * s);
      }
      const int in_tile = row_in_tile + 32 * i, row = tile + in_tile;
      if (row < end) {
        gate[i].Store(gate_up[row] + column);
        up[i].Store(gate_up[row] + columns + column);
      }
      *reinterpret_cast<Vector8<T>*>(&s_terms[0][in_tile][threadIdx.x % 8 * 8]) = gate[i];
      *reinterpret_cast<Vector8<T>*>(&s_terms[1][in_tile][threadIdx.x % 8 * 8]) = up[i];
      *reinterpret_cast<Vector8<T>*>(&s_terms[2][in_tile][threadIdx.x % 8 * 8]) = out;
    }
    if (tile + kTile < end) fetch(tile + kTile);
    __syncthreads();
    const int block = lane / 8, in_block = lane % 8;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int k = (half * 2 + step) * 16;
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        uint32_t a[4], b[4];
        LoadTransposed(&s_terms[p][k + in_block + block / 2 * 8][m + block % 2 * 8], a);
        const int b_row = k + in_block + block % 2 * 8, b_column = block / 2 * 8;
        LoadTransposed(p < 2 ? &s_lora[b_row][p * kRank + b_column] : &s_d[b_row][b_column], b);
        MultiplyAdd(T{}, sums[p][0], a, b[0], b[1]);
        MultiplyAdd(T{}, sums[p][1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    float* const out = partial + ((static_cast<int64_t>(blockIdx.y) * kHalves + half) * 3 + p) * columns * kRank;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = strip + m + lane / 4 + j / 2 * 8, r = n * 8 + lane % 4 * 2 + j % 2;
        out[static_cast<int64_t>(row) * kRank + r] = sums[p][n][j];
      }
    }
  }
}

__global__ void AddPartialSumsKernel(const float* partial, int parts, int columns, float scale, float* db_gate, float* db_up, float* da) {
  const int64_t size = static_cast<int64_t>(columns) * kRank;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int p = blockIdx.y;
  if (i >= size) return;
  float sum = 0;
  for (int part = 0; part < parts; ++part) sum += partial[(static_cast<int64_t>(part) * 3 + p) * size + i];
  if (p == 0) db_gate[i] += scale * sum;
  if (p == 1) db_up[i] += scale * sum;
  if (p == 2) da[i % kRank * columns + i / kRank] += sum;
}

int RunsOf(int64_t rows) { return static_cast<int>(std::clamp<int64_t>(rows / (kTile * kLeastTiles), 1, kMostRuns)); }

}  // namespace

int64_t SwiGluSumsElements(int64_t rows, int64_t columns) { return static_cast<int64_t>(RunsOf(rows)) * kHalves * 3 * columns * kRank; }

bool SwiGluBackwardSumsServes(Type type, int64_t rows, int64_t columns, int64_t rank, Matrix dout, Matrix gate_up, Matrix lora, Matrix d) {
  if (type == Type::kFloat || rank != kRank || columns % kTile != 0 || rows < kTile * kLeastTiles) return false;
  using T = __nv_bfloat16;  // of the same size as the other
  return Aligned<T>(dout, columns) && Aligned<T>(gate_up, columns) && Aligned<T>(lora, 2 * kRank) && Aligned<T>(d, kRank);
}

void SwiGluBackwardSums(Type type, int64_t rows, int64_t columns, Matrix dout, Matrix gate_up, Matrix lora, Matrix d, float scale, float* partial,
                        float* db_gate, float* db_up, float* da, cudaStream_t stream) {
  const int runs = RunsOf(rows);
  const int tiles = static_cast<int>((rows + kTile - 1) / kTile), rows_of_run = (tiles + runs - 1) / runs * kTile;
  const dim3 grid(static_cast<unsigned>(columns / kTile), static_cast<unsigned>(runs));
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    SwiGluBackwardSumsKernel<T><<<grid, kThreads, 0, stream>>>(Rows<T>(dout), Rows<T>(gate_up), Rows<T>(lora), Rows<T>(d), partial, static_cast<int>(rows),
                                                               static_cast<int>(columns), rows_of_run);
  };
  type == Type::kHalf ? launch(__half{}) : launch(__nv_bfloat16{});
  CheckLaunch("SwiGluBackwardSums");
  const dim3 sums(static_cast<unsigned>((columns * kRank + kThreads - 1) / kThreads), 3);
  AddPartialSumsKernel<<<sums, kThreads, 0, stream>>>(partial, runs * kHalves, static_cast<int>(columns), scale, db_gate, db_up, da);
  CheckLaunch("SwiGluBackwardSums");
}

}  // namespace ppft::trainer::cuda
