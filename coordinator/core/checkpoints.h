// When a checkpoint is whole, which one is best, and which ones may go. PURE.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "ppft/v1/checkpoint.pb.h"
#include "ppft/v1/plan.pb.h"
#include "ppft/v1/trainer.pb.h"

namespace ppft::coordinator {

// Ranks whose files make up a checkpoint or an export: those of replica 0, by pipeline rank.
std::vector<int32_t> StateOwners(const v1::Plan& plan);

// The rank that reports loss: the last stage of replica 0. -1 for an empty plan.
int32_t LossRank(const v1::Plan& plan);

// The manifest of a checkpoint, once every owner has reported; nullopt before. `written`: rank -> its message, all of one step and epoch.
std::optional<v1::CheckpointManifest> JoinCheckpoint(const v1::Plan& plan, const std::map<int32_t, v1::CheckpointWritten>& written);

// The best one: the newest that was the best when it was written. nullptr if none was. `manifests` by step.
const v1::CheckpointManifest* BestCheckpoint(const std::vector<v1::CheckpointManifest>& manifests);

// The newest one that a job can go on from; nullptr if there is none. `needs_best`: the best model so far is wanted at the end, so the checkpoint that holds it
// has to be there, too.
const v1::CheckpointManifest* NewestUsable(const std::vector<v1::CheckpointManifest>& manifests, bool needs_best);

// Steps that save_total_limit lets go, oldest first; never the newest, the best, or one in `needed` (what a running attempt resumes from).
std::vector<int64_t> CheckpointsToDelete(const std::vector<v1::CheckpointManifest>& manifests, int save_total_limit, const std::set<int64_t>& needed);

}  // namespace ppft::coordinator
