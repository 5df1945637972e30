#include "coordinator/core/checkpoints.h"

#include <algorithm>
#include <utility>

namespace ppft::coordinator {

std::vector<int32_t> StateOwners(const v1::Plan& plan) {
  std::vector<std::pair<int32_t, int32_t>> owners;  // (pipeline rank, rank)
  for (const v1::RankPlan& rank : plan.ranks()) {
    if (rank.replica() == 0) owners.emplace_back(rank.pipeline_rank(), rank.rank());
  }
  std::sort(owners.begin(), owners.end());
  std::vector<int32_t> ranks;
  for (const auto& [pipeline_rank, rank] : owners) ranks.push_back(rank);
  return ranks;
}

int32_t LossRank(const v1::Plan& plan) {
  const std::vector<int32_t> owners = StateOwners(plan);
  return owners.empty() ? -1 : owners.back();
}

std::optional<v1::CheckpointManifest> JoinCheckpoint(const v1::Plan& plan, const std::map<int32_t, v1::CheckpointWritten>& written) {
  const std::vector<int32_t> owners = StateOwners(plan);
  if (owners.empty()) return std::nullopt;
  v1::CheckpointManifest manifest;
  for (const int32_t rank : owners) {
    const auto it = written.find(rank);
    if (it == written.end()) return std::nullopt;
    for (const v1::LocalFile& file : it->second.files()) *manifest.add_files() = file.content();
    if (it->second.best()) manifest.set_best(true);
    if (it->second.has_eval_loss()) manifest.set_eval_loss(it->second.eval_loss());
  }
  *manifest.mutable_state() = written.at(owners.back()).state();
  return manifest;
}

const v1::CheckpointManifest* BestCheckpoint(const std::vector<v1::CheckpointManifest>& manifests) {
  const v1::CheckpointManifest* best = nullptr;
  for (const v1::CheckpointManifest& manifest : manifests) {
    if (manifest.best()) best = &manifest;
  }
  return best;
}

const v1::CheckpointManifest* NewestUsable(const std::vector<v1::CheckpointManifest>& manifests, bool needs_best) {
  std::set<int64_t> there;
  const v1::CheckpointManifest* newest = nullptr;
  for (const v1::CheckpointManifest& manifest : manifests) {
    there.insert(manifest.state().step());
    const int64_t best = manifest.state().best_step();
    if (!needs_best || best == 0 || there.count(best) > 0) newest = &manifest;
  }
  return newest;
}

std::vector<int64_t> CheckpointsToDelete(const std::vector<v1::CheckpointManifest>& manifests, int save_total_limit, const std::set<int64_t>& needed) {
  std::vector<int64_t> gone;
  const v1::CheckpointManifest* best = BestCheckpoint(manifests);
  int excess = static_cast<int>(manifests.size()) - std::max(1, save_total_limit);
  for (const v1::CheckpointManifest& manifest : manifests) {
    if (excess <= 0) break;
    const bool kept = &manifest == &manifests.back() || &manifest == best || needed.count(manifest.state().step()) > 0;
    if (kept) continue;
    gone.push_back(manifest.state().step());
    --excess;
  }
  return gone;
}

}  // namespace ppft::coordinator
