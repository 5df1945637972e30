#include "worker/trainer/cuda/cudnn_attention.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>
#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <unordered_map>

namespace cudnn_frontend {

// The library that cudnn-frontend takes cuDNN's functions from: the one that LibTorch has loaded.
void* cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW);

}  // namespace cudnn_frontend

namespace ppft::trainer::cuda {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Graph;
using fe::graph::Tensor_attributes;

// The names of the tensors in a call.
enum Id : int64_t {
  kQ = 1,
  kK,
  kV,
  kOut,
  kStats,
  kQkvOffsets,
  kOutOffsets,
  kStatsOffsets,
  kQueryOffsets,
  kKeyOffsets,
  kQueryLengths,
  kKeyLengths,
  kDout,
  kDq,
  kDk,
  kDv,
};

using TensorPtr = std::shared_ptr<Tensor_attributes>;

// One pass's graph under construction.
class Builder {
 public:
  explicit Builder(const AttentionShape& shape) : shape_(shape), graph_(std::make_shared<Graph>()) {
    graph_->set_io_data_type(shape.type == at::kHalf ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
  }

  const std::shared_ptr<Graph>& graph() const { return graph_; }
  TensorPtr Integers(int64_t id, int64_t count) {
    return graph_->tensor(Tensor_attributes().set_uid(id).set_dim({count, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(fe::DataType_t::INT32));
  }
  TensorPtr Offsets(int64_t id) { return Integers(id, shape_.documents + 1); }
  TensorPtr Lengths(int64_t id) { return Integers(id, shape_.documents); }

  // [documents, heads, longest, head_dim] in rows `stride` apart.
  void Lay(const TensorPtr& t, int64_t id, int64_t heads, int64_t stride, const TensorPtr& offsets) const {
    t->set_uid(id)
        .set_dim({shape_.documents, heads, shape_.longest, shape_.head_dim})
        .set_stride({shape_.longest * stride, shape_.head_dim, stride, 1})
        .set_ragged_offset(offsets);
  }
  TensorPtr HeadRows(int64_t id, int64_t heads, int64_t stride, const TensorPtr& offsets) {
    const TensorPtr t = graph_->tensor(Tensor_attributes().set_uid(id).set_dim({1, 1, 1, 1}).set_stride({1, 1, 1, 1}));
    Lay(t, id, heads, stride, offsets);
    return t;
  }
  // Log-sum-exp: [documents, heads, longest, 1], the heads of a token side by side.
  void LayStats(const TensorPtr& t, const TensorPtr& offsets) const {
    t->set_uid(kStats)
        .set_dim({shape_.documents, shape_.q_heads, shape_.longest, 1})
        .set_stride({shape_.longest * shape_.q_heads, 1, shape_.q_heads, 1})
        .set_data_type(fe::DataType_t::FLOAT)
        .set_ragged_offset(offsets);
  }

 private:
  const AttentionShape& shape_;
  std::shared_ptr<Graph> graph_;
};

int64_t RoundTokens(int64_t tokens) {
  const int64_t step = std::max<int64_t>(1024, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(tokens))) / 8);
  return (tokens + step - 1) / step * step;
}

void Execute(const Graph& graph, cudnnHandle_t handle, std::unordered_map<int64_t, void*>& pointers, int64_t workspace_bytes, const at::Tensor& like) {
  TORCH_CHECK(cudnnSetStream(handle, c10::cuda::getCurrentCUDAStream()) == CUDNN_STATUS_SUCCESS, "cuDNN does not take the stream");
  const at::Tensor workspace = at::empty({std::max<int64_t>(1, workspace_bytes)}, like.options().dtype(at::kByte));
  fe::error_t status = graph.execute(handle, pointers, workspace.data_ptr());
  TORCH_CHECK(status.is_good(), "cuDNN attention: ", status.get_message());
}

char* ColumnOf(const at::Tensor& rows, int64_t column) { return static_cast<char*>(rows.data_ptr()) + column * rows.element_size(); }

}  // namespace

AttentionShape::AttentionShape(at::ScalarType type, const HeadLayout& heads, const Documents& documents, int64_t qkv_stride, int64_t out_stride)
    : type(type),
      q_heads(heads.q_heads),
      kv_heads(heads.kv_heads),
      head_dim(heads.head_dim),
      documents(documents.capacity()),
      longest(std::max<int64_t>(128, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(documents.longest()))))),
      tokens(RoundTokens(documents.tokens())),
      qkv_stride(qkv_stride),
      out_stride(out_stride) {}

struct CudnnAttention::Plans {
  std::shared_ptr<Graph> forward, backward;
  int64_t forward_bytes = 0;  // of workspace
  int64_t backward_bytes = 0;
  std::string refusal;  // empty: cuDNN serves
};

CudnnAttention::CudnnAttention() {
  const cudnnStatus_t status = cudnnCreate(&handle_);
  TORCH_CHECK(status == CUDNN_STATUS_SUCCESS, "cuDNN: ", cudnnGetErrorString(status));
}

CudnnAttention::~CudnnAttention() { cudnnDestroy(handle_); }

CudnnAttention::Plans& CudnnAttention::Find(const AttentionShape& shape) {
  std::unique_ptr<Plans>& found = plans_[shape];
  if (found != nullptr) return *found;
  found = std::make_unique<Plans>();
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  const auto build = [&](Graph& graph, int64_t* bytes) {
    fe::error_t status = graph.build(handle_, {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK});
    if (status.is_good()) status = graph.get_workspace_size(*bytes);
    if (!status.is_good() && found->refusal.empty()) found->refusal = status.get_message();
  };

  Builder f(shape);
  {
    const TensorPtr qkv_offsets = f.Offsets(kQkvOffsets);
    const TensorPtr q = f.HeadRows(kQ, shape.q_heads, shape.qkv_stride, qkv_offsets);
    const TensorPtr k = f.HeadRows(kK, shape.kv_heads, shape.qkv_stride, qkv_offsets);
    const TensorPtr v = f.HeadRows(kV, shape.kv_heads, shape.qkv_stride, qkv_offsets);
    const auto [out, stats] = f.graph()->sdpa(q, k, v,
                                              fe::graph::SDPA_attributes()
                                                  .set_name("attention")
                                                  .set_generate_stats(true)
                                                  .set_attn_scale(scale)
                                                  .set_causal_mask(true)
                                                  .set_padding_mask(true)
                                                  .set_seq_len_q(f.Lengths(kQueryLengths))
                                                  .set_seq_len_kv(f.Lengths(kKeyLengths)));
    out->set_output(true);
    f.Lay(out, kOut, shape.q_heads, shape.out_stride, f.Offsets(kOutOffsets));
    stats->set_output(true);
    f.LayStats(stats, f.Offsets(kStatsOffsets));
  }
  build(*f.graph(), &found->forward_bytes);

  Builder b(shape);
  {
    // dq, dk, dv share the offsets of q, k, v: with offsets of their own cuDNN 9.19 gives wrong gradients past the first document. Dense rows everywhere,
    // because the workspace copies the gradients' strides for every query head.
    const int64_t q_stride = shape.q_heads * shape.head_dim, kv_stride = shape.kv_heads * shape.head_dim;
    const TensorPtr q_offsets = b.Offsets(kQueryOffsets), kv_offsets = b.Offsets(kKeyOffsets);
    const TensorPtr q = b.HeadRows(kQ, shape.q_heads, q_stride, q_offsets);
    const TensorPtr k = b.HeadRows(kK, shape.kv_heads, kv_stride, kv_offsets);
    const TensorPtr v = b.HeadRows(kV, shape.kv_heads, kv_stride, kv_offsets);
    const TensorPtr out = b.HeadRows(kOut, shape.q_heads, q_stride, q_offsets);
    const TensorPtr dout = b.HeadRows(kDout, shape.q_heads, q_stride, q_offsets);
    const TensorPtr stats = b.graph()->tensor(Tensor_attributes().set_uid(kStats).set_dim({1, 1, 1, 1}).set_stride({1, 1, 1, 1}));
    b.LayStats(stats, b.Offsets(kStatsOffsets));
    const auto [dq, dk, dv] = b.graph()->sdpa_backward(q, k, v, out, dout, stats,
                                                       fe::graph::SDPA_backward_attributes()
                                                           .set_name("attention backward")
                                                           .set_attn_scale(scale)
                                                           .set_causal_mask(true)
                                                           .set_padding_mask(true)
                                                           .set_seq_len_q(b.Lengths(kQueryLengths))
                                                           .set_seq_len_kv(b.Lengths(kKeyLengths))
                                                           .set_max_total_seq_len_q(shape.tokens)
                                                           .set_max_total_seq_len_kv(shape.tokens));
    for (const TensorPtr& t : {dq, dk, dv}) t->set_output(true);
    b.Lay(dq, kDq, shape.q_heads, q_stride, q_offsets);
    b.Lay(dk, kDk, shape.kv_heads, kv_stride, kv_offsets);
    b.Lay(dv, kDv, shape.kv_heads, kv_stride, kv_offsets);
  }
  build(*b.graph(), &found->backward_bytes);

  found->forward = f.graph();
  found->backward = b.graph();
  return *found;
}

bool CudnnAttention::Serves(const AttentionShape& shape, std::string* reason) {
  const Plans& plans = Find(shape);
  if (reason != nullptr) *reason = plans.refusal;
  return plans.refusal.empty();
}

void CudnnAttention::Forward(const AttentionShape& shape, const HeadLayout& heads, Documents& documents, const at::Tensor& qkv, const at::Tensor& out,
                             float* lse) {
  Plans& plans = Find(shape);
  std::unordered_map<int64_t, void*> pointers = {
      {kQ, ColumnOf(qkv, 0)},
      {kK, ColumnOf(qkv, heads.q_size())},
      {kV, ColumnOf(qkv, heads.q_size() + heads.kv_size())},
      {kOut, out.data_ptr()},
      {kStats, lse},
      {kQkvOffsets, documents.Offsets(shape.qkv_stride).data_ptr()},
      {kOutOffsets, documents.Offsets(shape.out_stride).data_ptr()},
      {kStatsOffsets, documents.Offsets(shape.q_heads).data_ptr()},
      {kQueryLengths, documents.lengths().data_ptr()},
      {kKeyLengths, documents.lengths().data_ptr()},
  };
  Execute(*plans.forward, handle_, pointers, plans.forward_bytes, qkv);
}

void CudnnAttention::Backward(const AttentionShape& shape, const HeadLayout& heads, Documents& documents, const at::Tensor& dout, const at::Tensor& qkv,
                              const at::Tensor& out, const float* lse, const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  Plans& plans = Find(shape);
  const at::Tensor q = qkv.narrow(1, 0, heads.q_size()).contiguous();
  const at::Tensor k = qkv.narrow(1, heads.q_size(), heads.kv_size()).contiguous();
  const at::Tensor v = qkv.narrow(1, heads.q_size() + heads.kv_size(), heads.kv_size()).contiguous();
  const at::Tensor dense_out = out.contiguous(), dense_dout = dout.contiguous();
  std::unordered_map<int64_t, void*> pointers = {
      {kQ, q.data_ptr()},
      {kK, k.data_ptr()},
      {kV, v.data_ptr()},
      {kOut, dense_out.data_ptr()},
      {kDout, dense_dout.data_ptr()},
      {kStats, const_cast<float*>(lse)},
      {kStatsOffsets, documents.Offsets(shape.q_heads).data_ptr()},
      {kQueryOffsets, documents.Offsets(heads.q_size()).data_ptr()},
      {kKeyOffsets, documents.Offsets(heads.kv_size()).data_ptr()},
      {kQueryLengths, documents.lengths().data_ptr()},
      {kKeyLengths, documents.lengths().data_ptr()},
      {kDq, dq.data_ptr()},
      {kDk, dk.data_ptr()},
      {kDv, dv.data_ptr()},
  };
  Execute(*plans.backward, handle_, pointers, plans.backward_bytes, qkv);
}

}  // namespace ppft::trainer::cuda
