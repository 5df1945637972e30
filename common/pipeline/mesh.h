// Which rank holds what: a mesh of replicas (data parallel) by pipeline ranks, and the stages on each pipeline rank.
#pragma once

#include <vector>

namespace ppft::pipeline {

// rank = replica * pipeline_size + pipeline_rank; stage s lives on pipeline rank s % pipeline_size of every replica.
struct Mesh {
  int data_parallel_size = 1;
  int pipeline_size = 1;
  int virtual_stages = 1;  // stages per rank

  int num_ranks() const { return data_parallel_size * pipeline_size; }
  int num_stages() const { return pipeline_size * virtual_stages; }
  int RankOf(int replica, int pipeline_rank) const { return replica * pipeline_size + pipeline_rank; }
  int ReplicaOf(int rank) const { return rank / pipeline_size; }
  int PipelineRankOf(int rank) const { return rank % pipeline_size; }
  int PipelineRankOfStage(int stage) const { return stage % pipeline_size; }
  int RankOfStage(int replica, int stage) const { return RankOf(replica, PipelineRankOfStage(stage)); }

  // Ascending.
  std::vector<int> StagesOf(int rank) const;
  // The ranks that hold the same stages as `rank`, itself included, by replica: the group that sums gradients.
  std::vector<int> ReplicaGroupOf(int rank) const;
  // The ranks of one replica in pipeline order.
  std::vector<int> PipelineOf(int replica) const;
};

}  // namespace ppft::pipeline
