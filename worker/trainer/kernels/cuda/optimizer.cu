// AdamW over a flat buffer, one block per chunk of a parameter, and sums of squares. Products and sums are rounded one by one (no fused multiply-add), so
// the update equals the CPU's to the bit.
#include "worker/trainer/kernels/cuda/device.cuh"

namespace ppft::trainer::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ __forceinline__ void WriteCopy(const ComputeTarget& target, int64_t element, float value) {
  const uint32_t e = static_cast<uint32_t>(element), columns = static_cast<uint32_t>(target.columns);
  static_cast<T*>(target.data)[(e / columns) * target.stride + e % columns] = FromFloat<T>(__fmul_rn(value, target.scale));
}

template <typename T, bool kUpdate>
__global__ void AdamWKernel(const OptimizerChunk* chunks, const ComputeTarget* targets, AdamWScalars s, float* master, const float* gradient,
                            int64_t gradient_begin, float* exp_avg, float* exp_avg_sq, int64_t moments_begin) {
  const OptimizerChunk chunk = chunks[blockIdx.x];
  ComputeTarget target;
  if (chunk.copy >= 0) target = targets[chunk.copy];
  for (int i = threadIdx.x; i < chunk.size; i += blockDim.x) {
    const int64_t at = chunk.begin + i;
    float value = master[at];
    if constexpr (kUpdate) {
      const int64_t moment = at - moments_begin;
      const float g = __fmul_rn(gradient[at - gradient_begin], s.gradient_factor);
      const float old = exp_avg[moment];
      const float m = __fadd_rn(old, __fmul_rn(s.one_minus_beta1, __fsub_rn(g, old)));
      const float v = __fadd_rn(__fmul_rn(exp_avg_sq[moment], s.beta2), __fmul_rn(__fmul_rn(s.one_minus_beta2, g), g));
      const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.correction2_sqrt), s.epsilon);
      value = __fadd_rn(__fmul_rn(value, s.decay), __fmul_rn(s.minus_step_size, __fdiv_rn(m, denominator)));
      master[at] = value;
      exp_avg[moment] = m;
      exp_avg_sq[moment] = v;
    }
    if (chunk.copy >= 0) WriteCopy<T>(target, at - target.begin, value);
  }
}

// The sum over the block's kThreads threads, for thread 0.
__device__ double BlockSum64(double x) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return shared[0];
}

__global__ void ChunkSquaresKernel(const OptimizerChunk* chunks, const float* values, int64_t begin, double* partial) {
  const OptimizerChunk chunk = chunks[blockIdx.x];
  double sum = 0;
  for (int i = threadIdx.x; i < chunk.size; i += blockDim.x) {
    const double value = values[chunk.begin - begin + i];
    sum += value * value;
  }
  sum = BlockSum64(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void SumChunksKernel(const double* partial, const int32_t* first, double* out) {
  double sum = 0;
  for (int i = first[blockIdx.x] + threadIdx.x; i < first[blockIdx.x + 1]; i += blockDim.x) sum += partial[i];
  sum = BlockSum64(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace

void AdamW(Type type, const OptimizerChunk* chunks, int num_chunks, const ComputeTarget* targets, const AdamWScalars* scalars, float* master,
           const float* gradient, int64_t gradient_begin, float* exp_avg, float* exp_avg_sq, int64_t moments_begin, cudaStream_t stream) {
  if (num_chunks == 0) return;
  Dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    if (scalars != nullptr) {
      AdamWKernel<T, true>
          <<<num_chunks, kThreads, 0, stream>>>(chunks, targets, *scalars, master, gradient, gradient_begin, exp_avg, exp_avg_sq, moments_begin);
    } else {
      AdamWKernel<T, false>
          <<<num_chunks, kThreads, 0, stream>>>(chunks, targets, AdamWScalars{}, master, gradient, gradient_begin, exp_avg, exp_avg_sq, moments_begin);
    }
  });
  CheckLaunch("AdamW");
}

void ChunkSquares(const OptimizerChunk* chunks, int num_chunks, const float* values, int64_t begin, double* partial, cudaStream_t stream) {
  if (num_chunks == 0) return;
  ChunkSquaresKernel<<<num_chunks, kThreads, 0, stream>>>(chunks, values, begin, partial);
  CheckLaunch("ChunkSquares");
}

void SumChunks(const double* partial, const int32_t* first, int num_parameters, double* out, cudaStream_t stream) {
  if (num_parameters == 0) return;
  SumChunksKernel<<<num_parameters, kThreads, 0, stream>>>(partial, first, out);
  CheckLaunch("SumChunks");
}

}  // namespace ppft::trainer::cuda
