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
  kQueryOffsets,
  kKeyOffsets,
  kOutOffsets,
  kStatsOffsets,
  kQueryLengths,
  kKeyLengths,
  kDout,
  kDq,
  kDk,
  kDv,
};

using TensorPtr = std::shared_ptr<Tensor_attributes>;

constexpr uintptr_t kWorkspaceAlignment = 256;

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
  TensorPtr Offsets(int64_t id) { return shape_.uniform ? nullptr : Integers(id, shape_.documents + 1); }
  TensorPtr Lengths(int64_t id) { return Integers(id, shape_.documents); }

  // [documents, heads, longest, head_dim] in rows `stride` apart.
  void Lay(const TensorPtr& t, int64_t id, int64_t heads, int64_t stride, const TensorPtr& offsets) const {
    t->set_uid(id).set_dim({shape_.documents, heads, shape_.longest, shape_.head_dim}).set_stride({shape_.longest * stride, shape_.head_dim, stride, 1});
    if (offsets != nullptr) t->set_ragged_offset(offsets);
  }
  TensorPtr HeadRows(int64_t id, int64_t heads, int64_t stride, const TensorPtr& offsets) {
    const TensorPtr t = graph_->tensor(Tensor_attributes().set_uid(id).set_dim({1, 1, 1, 1}).set_stride({1, 1, 1, 1}));
    Lay(t, id, heads, stride, offsets);
    return t;
  }
  // Log-sum-exp: [documents, heads, longest, 1]; with offsets the heads of a token lie side by side.
  void LayStats(const TensorPtr& t, const TensorPtr& offsets) const {
    const int64_t longest = shape_.longest, heads = shape_.q_heads;
    t->set_uid(kStats).set_dim({shape_.documents, heads, longest, 1}).set_data_type(fe::DataType_t::FLOAT);
    if (offsets != nullptr) {
      t->set_stride({longest * heads, 1, heads, 1}).set_ragged_offset(offsets);
    } else {
      t->set_stride({longest * heads, longest, 1, 1});
    }
  }

 private:
  const AttentionShape& shape_;
  std::shared_ptr<Graph> graph_;
};

int64_t RoundTokens(int64_t tokens) {
  const int64_t step = std::max<int64_t>(1024, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(tokens))) / 8);
  return (tokens + step - 1) / step * step;
}

void AddTable(const DocumentTable& documents, std::unordered_map<int64_t, void*>& pointers) {
  pointers[kQueryOffsets] = documents.q_offsets();
  pointers[kKeyOffsets] = documents.kv_offsets();
  pointers[kOutOffsets] = documents.out_offsets();
  pointers[kStatsOffsets] = documents.stats_offsets();
  pointers[kQueryLengths] = pointers[kKeyLengths] = documents.lengths();
}

// The workspace lies in `room` where that is defined and large enough.
void Execute(const Graph& graph, cudnnHandle_t handle, std::unordered_map<int64_t, void*>& pointers, int64_t workspace_bytes, const at::Tensor& room,
             const at::Tensor& like) {
  TORCH_CHECK(cudnnSetStream(handle, c10::cuda::getCurrentCUDAStream()) == CUDNN_STATUS_SUCCESS, "cuDNN does not take the stream");
  const bool fits = room.defined() && room.is_contiguous() && static_cast<int64_t>(room.nbytes()) >= workspace_bytes &&
                    reinterpret_cast<uintptr_t>(room.data_ptr()) % kWorkspaceAlignment == 0;
  const at::Tensor workspace = fits ? room : at::empty({std::max<int64_t>(1, workspace_bytes)}, like.options().dtype(at::kByte));
  fe::error_t status = graph.execute(handle, pointers, workspace.data_ptr());
  TORCH_CHECK(status.is_good(), "cuDNN attention: ", status.get_message());
}

}  // namespace

AttentionShape::AttentionShape(at::ScalarType type, const HeadLayout& heads, const DocumentsShape& documents, int64_t out_stride, bool uniform)
    : type(type),
      q_heads(heads.q_heads),
      kv_heads(heads.kv_heads),
      head_dim(heads.head_dim),
      documents(uniform ? documents.tokens / documents.uniform : documents.capacity),
      longest(uniform ? documents.uniform : documents.longest),
      tokens(uniform ? documents.tokens : RoundTokens(documents.tokens)),
      out_stride(out_stride),
      uniform(uniform) {}

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

  const int64_t q_stride = shape.q_heads * shape.head_dim, kv_stride = shape.kv_heads * shape.head_dim;
  Builder f(shape);
  {
    const TensorPtr q_offsets = f.Offsets(kQueryOffsets), kv_offsets = f.Offsets(kKeyOffsets);
    const TensorPtr q = f.HeadRows(kQ, shape.q_heads, q_stride, q_offsets);
    const TensorPtr k = f.HeadRows(kK, shape.kv_heads, kv_stride, kv_offsets);
    const TensorPtr v = f.HeadRows(kV, shape.kv_heads, kv_stride, kv_offsets);
    fe::graph::SDPA_attributes attributes;
    attributes.set_name("attention").set_generate_stats(true).set_attn_scale(scale).set_causal_mask(true);
    if (!shape.uniform) attributes.set_padding_mask(true).set_seq_len_q(f.Lengths(kQueryLengths)).set_seq_len_kv(f.Lengths(kKeyLengths));
    const auto [out, stats] = f.graph()->sdpa(q, k, v, attributes);
    out->set_output(true);
    f.Lay(out, kOut, shape.q_heads, shape.out_stride, f.Offsets(kOutOffsets));
    stats->set_output(true);
    f.LayStats(stats, f.Offsets(kStatsOffsets));
  }
  build(*f.graph(), &found->forward_bytes);

  Builder b(shape);
  {
    // dq, dk, dv share the offsets of q, k, v: with offsets of their own cuDNN 9.19 gives wrong gradients past the first document. They are dense, because
    // the workspace copies the gradients' strides for every query head.
    const TensorPtr q_offsets = b.Offsets(kQueryOffsets), kv_offsets = b.Offsets(kKeyOffsets), out_offsets = b.Offsets(kOutOffsets);
    const TensorPtr q = b.HeadRows(kQ, shape.q_heads, q_stride, q_offsets);
    const TensorPtr k = b.HeadRows(kK, shape.kv_heads, kv_stride, kv_offsets);
    const TensorPtr v = b.HeadRows(kV, shape.kv_heads, kv_stride, kv_offsets);
    const TensorPtr out = b.HeadRows(kOut, shape.q_heads, shape.out_stride, out_offsets);
    const TensorPtr dout = b.HeadRows(kDout, shape.q_heads, shape.out_stride, out_offsets);
    const TensorPtr stats = b.graph()->tensor(Tensor_attributes().set_uid(kStats).set_dim({1, 1, 1, 1}).set_stride({1, 1, 1, 1}));
    b.LayStats(stats, b.Offsets(kStatsOffsets));
    fe::graph::SDPA_backward_attributes attributes;
    attributes.set_name("attention backward").set_attn_scale(scale).set_causal_mask(true);
    if (!shape.uniform) {
      attributes.set_padding_mask(true)
          .set_seq_len_q(b.Lengths(kQueryLengths))
          .set_seq_len_kv(b.Lengths(kKeyLengths))
          .set_max_total_seq_len_q(shape.tokens)
          .set_max_total_seq_len_kv(shape.tokens);
    }
    const auto [dq, dk, dv] = b.graph()->sdpa_backward(q, k, v, out, dout, stats, attributes);
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

void CudnnAttention::Forward(const AttentionShape& shape, const DocumentTable& documents, const QkvParts& qkv, const at::Tensor& out, float* lse) {
  Plans& plans = Find(shape);
  std::unordered_map<int64_t, void*> pointers = {
      {kQ, qkv.q.data_ptr()}, {kK, qkv.k.data_ptr()}, {kV, qkv.v.data_ptr()}, {kOut, out.data_ptr()}, {kStats, lse},
  };
  if (!shape.uniform) AddTable(documents, pointers);
  Execute(*plans.forward, handle_, pointers, plans.forward_bytes, at::Tensor(), out);
}

void CudnnAttention::Backward(const AttentionShape& shape, const DocumentTable& documents, const at::Tensor& dout, const QkvParts& qkv, const at::Tensor& out,
                              const float* lse, const QkvParts& dqkv, const at::Tensor& room) {
  Plans& plans = Find(shape);
  std::unordered_map<int64_t, void*> pointers = {
      {kQ, qkv.q.data_ptr()},   {kK, qkv.k.data_ptr()},   {kV, qkv.v.data_ptr()},
      {kOut, out.data_ptr()},   {kDout, dout.data_ptr()}, {kStats, const_cast<float*>(lse)},
      {kDq, dqkv.q.data_ptr()}, {kDk, dqkv.k.data_ptr()}, {kDv, dqkv.v.data_ptr()},
  };
  if (!shape.uniform) AddTable(documents, pointers);
  Execute(*plans.backward, handle_, pointers, plans.backward_bytes, room, out);
}

}  // namespace ppft::trainer::cuda
