// safetensors files: strict reading of the header, tensor ranges, streaming writer, shard index.
//
// A file is a little-endian u64 (header bytes), the header (one JSON object: name -> {dtype, shape, data_offsets}, and "__metadata__" with text
// values), then the tensors' bytes. Nothing is allocated by a number of the file before that number is checked. Any thread.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/files.h"
#include "common/base/sha256.h"

namespace ppft::model {

constexpr int64_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct TensorInfo {
  std::string name;
  std::string dtype;  // F32 | BF16 | F16 | U8 | …: safetensors' words
  std::vector<int64_t> shape;
  int64_t offset = 0;      // of the first byte, from the start of the file
  int64_t size_bytes = 0;  // product of shape x bytes of dtype
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;              // by offset, without gaps, up to the end of the file
  std::map<std::string, std::string> metadata;  // __metadata__
  int64_t data_offset = 0;                      // of the first tensor byte, from the start of the file

  const TensorInfo* Find(absl::string_view name) const;  // nullptr if there is none
};

// Bytes of one element; 0 for an unknown word.
int64_t DtypeBytes(absl::string_view dtype);
// "[64, 172]"
std::string ShapeText(const std::vector<int64_t>& shape);

// `json` is the header's text, `file_bytes` the size of the whole file. INVALID_ARGUMENT "source: …" names the tensor and what is wrong.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view json, int64_t file_bytes, absl::string_view source);
// From an open file (position does not matter).
absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(int fd, int64_t file_bytes, absl::string_view source);
absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(const std::string& path);

// The first bytes of a file with these tensors in this order (offset and size_bytes of the input are not read), padded with blanks to a multiple of 8.
std::string SafetensorsHeaderBytes(const std::vector<TensorInfo>& tensors, const std::map<std::string, std::string>& metadata);

// Writes a file front to back: Create writes the header, Append the tensors' bytes in their order and in pieces of any size, Finish syncs. What is written is
// on the disk but for the last kUnsyncedBytes: no call waits for more than that.
// The same tensors and metadata give the same bytes. Without Finish the file at `path` is not valid.
class SafetensorsWriter {
 public:
  static absl::StatusOr<SafetensorsWriter> Create(const std::string& path, const std::vector<TensorInfo>& tensors,
                                                  const std::map<std::string, std::string>& metadata);
  static constexpr int64_t kUnsyncedBytes = int64_t{256} << 20;

  absl::Status Append(absl::string_view bytes);
  // fsync of the file. INTERNAL if bytes are missing. Returns the sha256 of the whole file.
  absl::StatusOr<std::string> Finish();
  int64_t file_bytes() const { return file_bytes_; }

 private:
  absl::Status Sync();

  std::string path_;
  Fd fd_;
  Sha256 sha_;
  int64_t file_bytes_ = 0;  // when complete
  int64_t written_ = 0;
  int64_t started_ = 0;  // up to here the kernel has been told to write to the disk
  int64_t synced_ = 0;   // up to here it has
};

// model.safetensors.index.json: tensor name -> shard file name (a plain name without folder; others are refused).
absl::StatusOr<std::map<std::string, std::string>> ParseSafetensorsIndex(absl::string_view json, absl::string_view source);
std::string SafetensorsIndexText(const std::map<std::string, std::string>& file_of_tensor, int64_t total_bytes);

}  // namespace ppft::model
