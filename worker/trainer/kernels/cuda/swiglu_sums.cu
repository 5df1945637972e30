// SwiGLU's backward pass with the adapters' sums over its rows: the gradients of gate and up and SwiGLU's output meet the adapters' columns while they are on
// the chip, by tensor cores, and none of the three is read again.
//
// A block owns 128 columns and a run of rows, 32 at a time; two tiles are on their way from memory while it works on the third. Its sums (fp32) go to a buffer
// of partial sums; a second kernel adds the parts in their order.
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 32;  // of a tile
constexpr int kColumns = 128;
constexpr int kRank = 16;  // of the adapters
constexpr int kMostRuns = 8;
constexpr int kLeastTiles = 32;  // of a run
constexpr int kPadding = 8;      // elements between rows: no two of a matrix's eight rows in one bank
constexpr int kStages = 3;
constexpr int kBlocks = 2;  // on a multiprocessor

// Of the matrices that a block works on, in shared memory.
template <typename T>
struct Tile {
  T terms[3][kRows][kColumns + kPadding];  // gate, up, gradient of the output; in their places their gradients and the output
  T lora[kRows][2 * kRank + kPadding];
  T d[kRows][kRank + kPadding];
};

template <typename T>
using Vector8 = Vector<T, 8>;

template <typename T>
__device__ __forceinline__ float Sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

// 16 bytes to shared memory, zeros where `real` is not; the thread goes on.
template <typename T>
__device__ __forceinline__ void Fetch(T* to, const T* from, bool real) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(real ? 16 : 0) : "memory");
}
// What has been fetched since the last call is one group.
__device__ __forceinline__ void CloseFetches() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until the thread's fetches have come, but for those of the newest groups.
__device__ __forceinline__ void WaitForFetches() { asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory"); }

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

// partial: [runs][3][columns][kRank]: sums of dgate x lora's first columns, of dup x its second, of SwiGLU's output x d.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    SwiGluBackwardSumsKernel(Rows<T> dout, Rows<T> gate_up, Rows<T> lora, Rows<T> d, float* partial, int rows, int columns, int rows_of_run) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  Tile<T>* const stages = reinterpret_cast<Tile<T>*>(dynamic);
  const int strip = blockIdx.x * kColumns, begin = blockIdx.y * rows_of_run, end = min(rows, begin + rows_of_run);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp * 16;
  // Of the thread's first vector; the second lies half a tile below.
  const int row_in_tile = threadIdx.x / 16, in_strip = threadIdx.x % 16 * 8;
  const int column = strip + in_strip;

  float sums[3][2][4] = {};
  const auto fetch = [&](int first, Tile<T>& to) {
    if (first < end) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int in_tile = row_in_tile + kRows / 2 * i;
        const bool real = first + in_tile < end;
        const int row = real ? first + in_tile : first;
        Fetch(&to.terms[0][in_tile][in_strip], gate_up[row] + column, real);
        Fetch(&to.terms[1][in_tile][in_strip], gate_up[row] + columns + column, real);
        Fetch(&to.terms[2][in_tile][in_strip], dout[row] + column, real);
      }
      if (threadIdx.x < 4 * kRows) {
        const int in_tile = threadIdx.x / 4, part = threadIdx.x % 4 * 8;
        const bool real = first + in_tile < end;
        Fetch(&to.lora[in_tile][part], lora[real ? first + in_tile : first] + part, real);
      } else if (threadIdx.x < 6 * kRows) {
        const int in_tile = threadIdx.x / 2 - 2 * kRows, part = threadIdx.x % 2 * 8;
        const bool real = first + in_tile < end;
        Fetch(&to.d[in_tile][part], d[real ? first + in_tile : first] + part, real);
      }
    }
    CloseFetches();
  };
  for (int stage = 0; stage + 1 < kStages; ++stage) fetch(begin + stage * kRows, stages[stage]);
  int stage = 0;
  for (int tile = begin; tile < end; tile += kRows, stage = (stage + 1) % kStages) {
    WaitForFetches();
    Tile<T>& at = stages[stage];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int in_tile = row_in_tile + kRows / 2 * i, row = tile + in_tile;
      Vector8<T>& first = *reinterpret_cast<Vector8<T>*>(&at.terms[0][in_tile][in_strip]);
      Vector8<T>& second = *reinterpret_cast<Vector8<T>*>(&at.terms[1][in_tile][in_strip]);
      Vector8<T>& third = *reinterpret_cast<Vector8<T>*>(&at.terms[2][in_tile][in_strip]);
      Vector8<T> gate = first, up = second, out = third;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float g = ToFloat(gate.at[j]), u = ToFloat(up.at[j]), dy = ToFloat(out.at[j]), s = Sigmoid<T>(g);
        out.at[j] = FromFloat<T>(g * s * u);
        gate.at[j] = FromFloat<T>(dy * u * s * (1.0f + g * (1.0f - s)));
        up.at[j] = FromFloat<T>(dy * g * s);
      }
      if (row < end) {
        gate.Store(gate_up[row] + column);
        up.Store(gate_up[row] + columns + column);
      }
      first = gate;
      second = up;
      third = out;
    }
    __syncthreads();  // the tile is whole, and the products of the one before have read theirs
    fetch(tile + (kStages - 1) * kRows, stages[(stage + kStages - 1) % kStages]);
    const int block = lane / 8, in_block = lane % 8;
#pragma unroll
    for (int k = 0; k < kRows; k += 16) {
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        uint32_t a[4], b[4];
        LoadTransposed(&at.terms[p][k + in_block + block / 2 * 8][m + block % 2 * 8], a);
        const int b_row = k + in_block + block % 2 * 8, b_column = block / 2 * 8;
        LoadTransposed(p < 2 ? &at.lora[b_row][p * kRank + b_column] : &at.d[b_row][b_column], b);
        MultiplyAdd(T{}, sums[p][0], a, b[0], b[1]);
        MultiplyAdd(T{}, sums[p][1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    float* const out = partial + (static_cast<int64_t>(blockIdx.y) * 3 + p) * columns * kRank;
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

// Of shared memory.
template <typename T>
constexpr int kBlockBytes = static_cast<int>(sizeof(Tile<T>)) * kStages;

// As many as leave the fewest multiprocessors of an H200 idle at the end; of the shape alone, so that equal inputs give equal sums on every device.
int RunsOf(int64_t rows, int64_t columns) {
  constexpr int64_t kAtOnce = 132 * kBlocks;
  const int64_t most = std::clamp<int64_t>(rows / (kRows * kLeastTiles), 1, kMostRuns), strips = columns / kColumns;
  const auto filled = [&](int64_t runs) { return static_cast<double>(strips * runs) / static_cast<double>((strips * runs + kAtOnce - 1) / kAtOnce); };
  int64_t best = most;
  for (int64_t runs = most - 1; runs >= (most + 1) / 2; --runs) {
    if (filled(runs) > filled(best)) best = runs;
  }
  return static_cast<int>(best);
}

}  // namespace

int64_t SwiGluSumsElements(int64_t rows, int64_t columns) { return static_cast<int64_t>(RunsOf(rows, columns)) * 3 * columns * kRank; }

bool SwiGluBackwardSumsServes(Type type, int64_t rows, int64_t columns, int64_t rank, Matrix dout, Matrix gate_up, Matrix lora, Matrix d) {
  if (type == Type::kFloat || rank != kRank || columns % kColumns != 0 || rows < kRows * kLeastTiles) return false;
  using T = __nv_bfloat16;  // of the same size as the other
  int device = 0, most = 0;
  Check(cudaGetDevice(&device), "cudaGetDevice");
  Check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  if (most < kBlockBytes<T>) return false;
  return Aligned<T>(dout, columns) && Aligned<T>(gate_up, columns) && Aligned<T>(lora, 2 * kRank) && Aligned<T>(d, kRank);
}

void SwiGluBackwardSums(Type type, int64_t rows, int64_t columns, Matrix dout, Matrix gate_up, Matrix lora, Matrix d, float scale, float* partial,
                        float* db_gate, float* db_up, float* da, cudaStream_t stream) {
  const int runs = RunsOf(rows, columns);
  const int tiles = static_cast<int>((rows + kRows - 1) / kRows), rows_of_run = (tiles + runs - 1) / runs * kRows;
  const dim3 grid(static_cast<unsigned>(columns / kColumns), static_cast<unsigned>(runs));
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    Check(cudaFuncSetAttribute(SwiGluBackwardSumsKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBlockBytes<T>), "SwiGluBackwardSums");
    SwiGluBackwardSumsKernel<T><<<grid, kThreads, kBlockBytes<T>, stream>>>(Rows<T>(dout), Rows<T>(gate_up), Rows<T>(lora), Rows<T>(d), partial,
                                                                            static_cast<int>(rows), static_cast<int>(columns), rows_of_run);
  };
  type == Type::kHalf ? launch(__half{}) : launch(__nv_bfloat16{});
  CheckLaunch("SwiGluBackwardSums");
  const dim3 sums(static_cast<unsigned>((columns * kRank + kThreads - 1) / kThreads), 3);
  AddPartialSumsKernel<<<sums, kThreads, 0, stream>>>(partial, runs, static_cast<int>(columns), scale, db_gate, db_up, da);
  CheckLaunch("SwiGluBackwardSums");
}

}  // namespace ppft::trainer::cuda
