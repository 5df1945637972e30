#include "common/pipeline/mesh.h"

namespace ppft::pipeline {

std::vector<int> Mesh::StagesOf(int rank) const {
  std::vector<int> stages;
  for (int chunk = 0; chunk < virtual_stages; ++chunk) stages.push_back(chunk * pipeline_size + PipelineRankOf(rank));
  return stages;
}

std::vector<int> Mesh::ReplicaGroupOf(int rank) const {
  std::vector<int> ranks;
  for (int replica = 0; replica < data_parallel_size; ++replica) ranks.push_back(RankOf(replica, PipelineRankOf(rank)));
  return ranks;
}

std::vector<int> Mesh::PipelineOf(int replica) const {
  std::vector<int> ranks;
  for (int pipeline_rank = 0; pipeline_rank < pipeline_size; ++pipeline_rank) ranks.push_back(RankOf(replica, pipeline_rank));
  return ranks;
}

}  // namespace ppft::pipeline
