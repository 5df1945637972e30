// Artifacts from what the ranks wrote: the PEFT adapter, the merged model, and the adapter of a checkpoint. Blocking; any thread.
//
// Deterministic: the same tensors and metric rows give the same files. Errors: INTERNAL or DATA_LOSS for ranks' files that are incomplete or
// damaged; INVALID_ARGUMENT with reason NUMERIC_DIVERGENCE for NaN or infinite weights; RESOURCE_EXHAUSTED for a full disk.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/artifacts/trainer_state.h"
#include "coordinator/controller.h"
#include "ppft/v1/artifact.pb.h"
#include "ppft/v1/checkpoint.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

// One manifest per format of spec.output.
absl::StatusOr<std::vector<v1::ArtifactManifest>> AssembleArtifacts(BlobStore& blobs, const AssembleInput& input);

// "<job>@step-<n>", type adapter; `rows` up to the checkpoint's step are logged in it.
absl::StatusOr<v1::ArtifactManifest> AssembleCheckpointAdapter(BlobStore& blobs, const v1::Job& job, const v1::ModelRecord& model,
                                                               const v1::CheckpointManifest& checkpoint, const std::vector<v1::MetricRow>& rows);

// An artifact from uploaded blobs (adapter_config.json, adapter_model.safetensors; other files are not taken). INVALID_ARGUMENT says what is
// wrong with them. The id follows from the two contents.
absl::StatusOr<v1::ArtifactManifest> MakeUploadedAdapter(BlobStore& blobs, const std::vector<v1::FileRef>& files);

// May this adapter start this job on this model? INVALID_ARGUMENT says which tensor or setting differs.
absl::Status CheckInitAdapter(const BlobStore& blobs, const v1::ArtifactManifest& adapter, const v1::ModelRecord& model, const v1::AdapterSpec& spec);

}  // namespace ppft::coordinator
