// The CUDA kernels as plain functions on device pointers: what the .cu files define and the torch side calls. Nothing here waits for the device.
//
// Rows: `stride` is the distance of two rows in elements; columns lie side by side. Vectors of 16 bytes are used where addresses, strides and column counts
// allow, single elements elsewhere: the results are the same. Sums are fp32 (fp64 where said) in an order that depends on the shape alone, so that
// equal inputs give equal bits. Each call checks the launch and throws std::runtime_error with CUDA's words.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ppft::trainer::cuda {

enum class Type { kFloat, kBFloat16, kHalf };

// Throws std::runtime_error "what: CUDA's words" unless `error` is cudaSuccess.
void Check(cudaError_t error, const char* what);

struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

// Kernels::AddRmsNorm; delta.data may be null.
void AddRmsNorm(Type type, int64_t rows, int64_t columns, Matrix x, Matrix delta, const void* weight, float eps, Matrix sum, Matrix normed, float* rstd,
                cudaStream_t stream);
void ApplyRmsNorm(Type type, int64_t rows, int64_t columns, Matrix x, const float* rstd, const void* weight, Matrix normed, cudaStream_t stream);
// normed.data may be null, or dnormed's.
void RmsNormBackward(Type type, int64_t rows, int64_t columns, Matrix dnormed, Matrix x, const float* rstd, const void* weight, Matrix dx, Matrix normed,
                     cudaStream_t stream);

// heads of q and k together; cos, sin: [positions, half] fp32, `table_stride` apart.
void Rope(Type type, int64_t rows, int heads, int half, Matrix qkv, const float* cos, const float* sin, int64_t table_stride, int64_t positions,
          const int32_t* position, bool inverse, cudaStream_t stream);

// Three dense matrices side by side in the rows of one: q, k, v of one token.
struct Parts {
  Matrix parts[3];
  int64_t columns[3] = {};
};
// The same rotation between packed rows (heads of q and k, then those of v, which is copied) and parts: from rows to parts, or back by the inverse.
void RopeToParts(Type type, int64_t rows, int half, Matrix packed, const Parts& parts, const float* cos, const float* sin, int64_t table_stride,
                 int64_t positions, const int32_t* position, cudaStream_t stream);
void RopeFromParts(Type type, int64_t rows, int half, const Parts& parts, Matrix packed, const float* cos, const float* sin, int64_t table_stride,
                   int64_t positions, const int32_t* position, cudaStream_t stream);

void SwiGlu(Type type, int64_t rows, int64_t columns, Matrix gate_up, Matrix out, cudaStream_t stream);
// gated.data may be null, or dout's.
void SwiGluBackward(Type type, int64_t rows, int64_t columns, Matrix dout, Matrix gate_up, Matrix dgate_up, Matrix gated, cudaStream_t stream);

// SwiGluBackward in place with the adapters' sums, for adapters of one rank on gate, up and down. lora: [rows, 2 rank], d: [rows, rank]. Adds to db_gate, db_up
// ([columns, rank]) scale * the gradients of gate and up, transposed, times lora's halves, and to da ([rank, columns]) d, transposed, times SwiGlu's output.
// partial: SwiGluSumsElements. Only where ...Serves says so.
bool SwiGluBackwardSumsServes(Type type, int64_t rows, int64_t columns, int64_t rank, Matrix dout, Matrix gate_up, Matrix lora, Matrix d);
int64_t SwiGluSumsElements(int64_t rows, int64_t columns);
void SwiGluBackwardSums(Type type, int64_t rows, int64_t columns, Matrix dout, Matrix gate_up, Matrix lora, Matrix d, float scale, float* partial,
                        float* db_gate, float* db_up, float* da, cudaStream_t stream);

// row_losses: [rows] fp64 scratch. device_weight, where not null, is read in place of `weight`. Rows with target -1 count for nothing.
void CrossEntropy(Type type, int64_t rows, int64_t vocab, Matrix logits, const int64_t* targets, float weight, const float* device_weight, bool with_gradient,
                  double* row_losses, double* loss_sum, cudaStream_t stream);

// out[t] = from[row_of[t]], 0 where row_of[t] is negative.
void SpreadRows(Type type, int64_t rows, int64_t columns, Matrix from, const int32_t* row_of, Matrix out, cudaStream_t stream);

struct DropoutNumbers {
  const uint4* rows;  // where not null, each row's key and number: DropoutSequence::rows
  uint32_t key[2];
  uint32_t stream;
  uint32_t domain;
  uint32_t threshold;  // a number below it drops
  float scale;
};
void Dropout(Type type, int64_t rows, int64_t columns, Matrix x, DropoutNumbers numbers, Matrix out, cudaStream_t stream);
void DropoutBackward(Type type, int64_t rows, int64_t columns, Matrix dout, DropoutNumbers numbers, Matrix dx, cudaStream_t stream);

// Three matrices of `rows` rows side by side into one: dqkv from dq, dk, dv. Column counts in elements of `type`.
void JoinColumns(Type type, int64_t rows, const Matrix (&parts)[3], const int64_t (&columns)[3], Matrix out, cudaStream_t stream);

// The optimizer's work list: at most kOptimizerChunk elements of one parameter each.
inline constexpr int kOptimizerChunk = 4096;
struct OptimizerChunk {
  int64_t begin = 0;  // in the flat buffers
  int32_t size = 0;
  int32_t copy = -1;  // index of its ComputeTarget, or none
};
// Where the parameter's new value goes in the compute type: element e of the parameter to row e / columns, column e % columns, times `scale`.
struct ComputeTarget {
  int64_t begin = 0;  // of the parameter in the flat buffers
  void* data = nullptr;
  int64_t stride = 0;
  int32_t columns = 1;
  float scale = 1;
};
// The scalars of one update, rounded to fp32 where torch does: ../../optim/adamw.cc.
struct AdamWScalars {
  float decay, one_minus_beta1, beta2, one_minus_beta2, correction2_sqrt, epsilon, minus_step_size, gradient_factor;
};
// master: flat; gradient: of the elements from `gradient_begin`; exp_avg, exp_avg_sq: from `moments_begin`. With scalars null only the compute copies are
// written.
void AdamW(Type type, const OptimizerChunk* chunks, int num_chunks, const ComputeTarget* targets, const AdamWScalars* scalars, float* master,
           const float* gradient, int64_t gradient_begin, float* exp_avg, float* exp_avg_sq, int64_t moments_begin, cudaStream_t stream);
// partial[c] = sum of squares of chunk c, fp64. values: of the elements from `begin`.
void ChunkSquares(const OptimizerChunk* chunks, int num_chunks, const float* values, int64_t begin, double* partial, cudaStream_t stream);
// out[p] = sum of partial[first[p]] … partial[first[p + 1] - 1].
void SumChunks(const double* partial, const int32_t* first, int num_parameters, double* out, cudaStream_t stream);

}  // namespace ppft::trainer::cuda
