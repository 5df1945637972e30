// PrepareRunner: from datasets to token files by the child ppft-prepare, with a cache on disk, so that the same data under the same options is
// tokenised once. Thread-safe; calls block for as long as the child runs.
//
// Errors: what the user must change is INVALID_ARGUMENT with ppft-prepare's sentence and its code as ErrorInfo reason (DATASET_INVALID,
// TOKENIZER_MISMATCH, MODEL_INVALID, SPEC_INVALID); a full disk is RESOURCE_EXHAUSTED; CANCELLED; a crash of the child is INTERNAL.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/artifacts/blob_store.h"
#include "coordinator/controller.h"
#include "ppft/v1/dataset.pb.h"
#include "ppft/v1/stored.pb.h"

namespace ppft::coordinator {

class PrepareRunner {
 public:
  PrepareRunner(BlobStore* blobs, std::string binary) : blobs_(blobs), binary_(std::move(binary)) {}

  absl::StatusOr<v1::PreparedData> Prepare(const PrepareInput& input, const std::function<bool()>& cancelled);

  // datasets[i] belongs to data.datasets(i). `rows` rows of all datasets in order.
  absl::StatusOr<v1::PreviewDatasetResponse> Preview(const v1::ModelRecord& model, const v1::DataSpec& data, const std::vector<v1::Dataset>& datasets, int rows,
                                                     const std::function<bool()>& cancelled);

  // A folder with tokenizer files: does it load, and do its ids fit a vocabulary of that size?
  absl::Status CheckTokenizer(const std::string& tokenizer_dir, int64_t vocab_size, const std::function<bool()>& cancelled);

  // What decides the token files, as a hash: contents, options that matter, tokenizer.
  static std::string CacheKey(const PrepareInput& input);

 private:
  absl::StatusOr<std::string> RequestJson(const v1::ModelRecord& model, const v1::DataSpec& data, int64_t seed, const std::vector<v1::Dataset>& datasets,
                                          const std::vector<v1::Dataset>& test_datasets, const std::string& folder);
  absl::StatusOr<v1::PreparedData> Cached(const std::string& key);
  absl::StatusOr<v1::PreparedData> Collect(const std::string& folder);

  BlobStore* const blobs_;
  const std::string binary_;
};

}  // namespace ppft::coordinator
