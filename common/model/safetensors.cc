#include "common/model/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "common/model/json.h"

namespace ppft::model {
namespace {

using nlohmann::json;

constexpr int kMaxDimensions = 8;
constexpr int64_t kStartBytes = int64_t{16} << 20;  // what a writer hands to the disk at once
constexpr char kMetadata[] = "__metadata__";

// Builds the tensor list straight from the parser's events: a header of 100 MB never becomes a tree of JSON values.
class HeaderReader : public nlohmann::json_sax<json> {
 public:
  bool null() override { return Fail("holds null"); }
  bool boolean(bool) override { return Fail("holds true or false"); }
  bool number_integer(number_integer_t) override { return Fail("holds a negative number"); }
  bool number_float(number_float_t, const string_t&) override { return Fail("holds a number that is not an integer"); }
  bool binary(binary_t&) override { return Fail("holds binary data"); }
  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != kShape && place_ != kOffsets) return Fail("holds a number where none belongs");
    if (value > static_cast<uint64_t>(INT64_MAX)) return Fail("holds a number that is too large");
    std::vector<int64_t>& list = place_ == kShape ? tensor_.shape : offsets_;
    if (list.size() == kMaxDimensions) return Fail(absl::StrCat("has more than ", kMaxDimensions, " dimensions"));
    list.push_back(static_cast<int64_t>(value));
    return true;
  }
  bool string(string_t& value) override {
    if (place_ == kMetadataValue) {
      if (!header_.metadata.emplace(key_, value).second) return Fail(absl::StrCat("names ", key_, " twice"));
      return true;
    }
    if (place_ != kDtype) return Fail("holds text where none belongs");
    tensor_.dtype = value;
    return true;
  }
  bool start_object(std::size_t) override {
    if (place_ == kStart) {
      place_ = kTop;
      return true;
    }
    if (place_ != kTopValue) return Fail("holds an object where none belongs");
    place_ = key_ == kMetadata ? kMetadataKeys : kTensor;
    tensor_ = TensorInfo{key_, "", {}, 0, 0};
    offsets_.clear();
    seen_ = 0;
    return true;
  }
  bool key(string_t& key) override {
    if (place_ == kTop) {
      key_ = key;
      if (key == kMetadata && std::exchange(has_metadata_, true)) return Fail("stands there twice");
      place_ = kTopValue;
    } else if (place_ == kMetadataKeys || place_ == kMetadataValue) {
      key_ = key;
      place_ = kMetadataValue;
    } else {
      place_ = key == "dtype" ? kDtype : key == "shape" ? kShapeStart : key == "data_offsets" ? kOffsetsStart : kStart;
      if (place_ == kStart) return Fail(absl::StrCat("has the unknown key \"", key.substr(0, 60), "\""));
      const int bit = 1 << place_;
      if (seen_ & bit) return Fail(absl::StrCat("has \"", key, "\" twice"));
      seen_ |= bit;
    }
    return true;
  }
  bool end_object() override {
    if (place_ == kTop) {
      place_ = kEnd;
    } else if (place_ == kMetadataKeys || place_ == kMetadataValue) {
      place_ = kTop;
    } else {
      if (seen_ != (1 << kDtype | 1 << kShapeStart | 1 << kOffsetsStart)) return Fail("must have dtype, shape and data_offsets");
      if (offsets_.size() != 2) return Fail("must have two data_offsets");
      place_ = kTop;
      return AddTensor();
    }
    return true;
  }
  bool start_array(std::size_t) override {
    if (place_ != kShapeStart && place_ != kOffsetsStart) return Fail("holds a list where none belongs");
    place_ = place_ == kShapeStart ? kShape : kOffsets;
    return true;
  }
  bool end_array() override {
    place_ = kTensor;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    error_ = absl::StrCat("the header is not valid JSON near byte ", position);
    return false;
  }
  const std::string& error() const { return error_; }
  SafetensorsHeader& header() { return header_; }

 private:
  enum Place { kStart, kTop, kTopValue, kMetadataKeys, kMetadataValue, kTensor, kDtype, kShapeStart, kShape, kOffsetsStart, kOffsets, kEnd };

  bool Fail(absl::string_view what) {
    if (place_ == kStart && header_.tensors.empty() && key_.empty()) {
      error_ = "the header is not a JSON object";
    } else {
      error_ = absl::StrCat(tensor_.name.empty() ? key_.substr(0, 200) : tensor_.name.substr(0, 200), ": ", what);
    }
    return false;
  }

  bool AddTensor() {
    const int64_t element = DtypeBytes(tensor_.dtype);
    if (element == 0) return Fail(absl::StrCat("the dtype \"", tensor_.dtype.substr(0, 20), "\" is unknown"));
    int64_t size = element;
    for (const int64_t dimension : tensor_.shape) {
      if (__builtin_mul_overflow(size, dimension, &size)) return Fail(absl::StrCat("the shape ", ShapeText(tensor_.shape), " is too large"));
    }
    if (offsets_[1] < offsets_[0]) return Fail(absl::StrCat("its data ends (", offsets_[1], ") before it begins (", offsets_[0], ")"));
    if (offsets_[1] - offsets_[0] != size) {
      return Fail(absl::StrCat("the shape ", ShapeText(tensor_.shape), " of ", tensor_.dtype, " needs ", size, " bytes, but its data_offsets hold ",
                               offsets_[1] - offsets_[0]));
    }
    tensor_.offset = offsets_[0];
    tensor_.size_bytes = size;
    header_.tensors.push_back(std::move(tensor_));
    tensor_ = TensorInfo{};
    return true;
  }

  Place place_ = kStart;
  std::string key_;
  bool has_metadata_ = false;
  TensorInfo tensor_;
  std::vector<int64_t> offsets_;
  int seen_ = 0;
  SafetensorsHeader header_;
  std::string error_;
};

absl::Status CheckContiguous(SafetensorsHeader& header, int64_t data_bytes, absl::string_view source) {
  std::vector<TensorInfo>& tensors = header.tensors;
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::make_pair(a.offset, a.offset + a.size_bytes) < std::make_pair(b.offset, b.offset + b.size_bytes);
  });
  std::vector<absl::string_view> names;
  int64_t end = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    names.push_back(tensors[i].name);
    if (tensors[i].offset < end) {
      return absl::InvalidArgumentError(
          absl::StrCat(source, ": ", tensors[i].name, " and ", tensors[i - 1].name, " overlap; take the file from its publisher again"));
    }
    if (tensors[i].offset > end) {
      return absl::InvalidArgumentError(absl::StrCat(source, ": ", tensors[i].offset - end, " bytes before ", tensors[i].name, " belong to no tensor"));
    }
    end += tensors[i].size_bytes;
    if (end > data_bytes) {
      return absl::InvalidArgumentError(absl::StrCat(source, ": ", tensors[i].name, " ends at byte ", end, " of the data, but the file holds ", data_bytes,
                                                     ": it is truncated; download it again"));
    }
  }
  if (end != data_bytes) return absl::InvalidArgumentError(absl::StrCat(source, ": ", data_bytes - end, " bytes at the end belong to no tensor"));
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) return absl::InvalidArgumentError(absl::StrCat(source, ": the tensor ", *twice, " stands there twice"));
  return absl::OkStatus();
}

}  // namespace

const TensorInfo* SafetensorsHeader::Find(absl::string_view name) const {
  for (const TensorInfo& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

int64_t DtypeBytes(absl::string_view dtype) {
  static constexpr std::pair<absl::string_view, int64_t> kBytes[] = {{"F32", 4},  {"BF16", 2}, {"F16", 2}, {"U8", 1},      {"I8", 1},
                                                                     {"BOOL", 1}, {"U16", 2},  {"I16", 2}, {"U32", 4},     {"I32", 4},
                                                                     {"F64", 8},  {"U64", 8},  {"I64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  for (const auto& [word, bytes] : kBytes) {
    if (word == dtype) return bytes;
  }
  return 0;
}

std::string ShapeText(const std::vector<int64_t>& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view text, int64_t file_bytes, absl::string_view source) {
  HeaderReader reader;
  if (text.empty() || text[0] != '{') return absl::InvalidArgumentError(absl::StrCat(source, ": not a safetensors file: its header is not a JSON object"));
  if (!json::sax_parse(text.begin(), text.end(), &reader)) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": ", reader.error().empty() ? "the header is not valid JSON" : reader.error()));
  }
  SafetensorsHeader header = std::move(reader.header());
  header.data_offset = 8 + static_cast<int64_t>(text.size());
  PPFT_RETURN_IF_ERROR(CheckContiguous(header, file_bytes - header.data_offset, source));
  for (TensorInfo& tensor : header.tensors) tensor.offset += header.data_offset;
  return header;
}

absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(int fd, int64_t file_bytes, absl::string_view source) {
  if (file_bytes < 8) return absl::InvalidArgumentError(absl::StrCat(source, ": not a safetensors file: only ", file_bytes, " bytes"));
  unsigned char first[8];
  PPFT_RETURN_IF_ERROR(ReadAt(fd, reinterpret_cast<char*>(first), 8, 0, source));
  uint64_t size = 0;
  for (int i = 7; i >= 0; --i) size = size << 8 | first[i];
  if (size > static_cast<uint64_t>(file_bytes - 8)) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": its header says ", size, " bytes, but the file has ", file_bytes, ": it is truncated or not a safetensors file"));
  }
  if (size > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": its header of ", size, " bytes is longer than the allowed ", kMaxSafetensorsHeaderBytes));
  }
  std::string text(size, '\0');
  PPFT_RETURN_IF_ERROR(ReadAt(fd, text.data(), static_cast<int64_t>(size), 8, source));
  return ParseSafetensorsHeader(text, file_bytes, source);
}

absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(const std::string& path) {
  Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoStatus(errno, path);
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, path);
  return ReadSafetensorsHeader(fd.get(), info.st_size, path);
}

std::string SafetensorsHeaderBytes(const std::vector<TensorInfo>& tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  int64_t offset = 0;
  // Appended as text: insertion into an ordered object looks every key up again.
  std::string text = header.dump();
  text.pop_back();
  for (const TensorInfo& tensor : tensors) {
    const int64_t size = std::accumulate(tensor.shape.begin(), tensor.shape.end(), DtypeBytes(tensor.dtype), std::multiplies<int64_t>());
    if (text.size() > 1) text += ',';
    absl::StrAppend(&text, json(tensor.name).dump(), ":{\"dtype\":", json(tensor.dtype).dump(), ",\"shape\":[", absl::StrJoin(tensor.shape, ","),
                    "],\"data_offsets\":[", offset, ",", offset + size, "]}");
    offset += size;
  }
  text += '}';
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(text.size() >> (8 * i));
  return bytes + text;
}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(const std::string& path, const std::vector<TensorInfo>& tensors,
                                                            const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer;
  writer.path_ = path;
  writer.fd_ = Fd(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!writer.fd_) return ErrnoStatus(errno, path);
  const std::string header = SafetensorsHeaderBytes(tensors, metadata);
  writer.file_bytes_ = static_cast<int64_t>(header.size());
  for (const TensorInfo& tensor : tensors) {
    int64_t size = DtypeBytes(tensor.dtype);
    if (size == 0) return absl::InternalError(absl::StrCat(path, ": unknown dtype ", tensor.dtype, " of ", tensor.name));
    for (const int64_t dimension : tensor.shape) {
      if (dimension < 0 || __builtin_mul_overflow(size, dimension, &size)) return absl::InternalError(absl::StrCat(path, ": bad shape of ", tensor.name));
    }
    if (__builtin_add_overflow(writer.file_bytes_, size, &writer.file_bytes_)) return absl::InternalError(absl::StrCat(path, ": too large"));
  }
  PPFT_RETURN_IF_ERROR(writer.Append(header));
  return writer;
}

absl::Status SafetensorsWriter::Append(absl::string_view bytes) {
  if (static_cast<int64_t>(bytes.size()) > file_bytes_ - written_) return absl::InternalError(absl::StrCat(path_, ": more bytes than its header says"));
  while (!bytes.empty()) {
    const absl::string_view part = bytes.substr(0, static_cast<size_t>(kUnsyncedBytes - (written_ - synced_)));
    PPFT_RETURN_IF_ERROR(WriteAll(fd_.get(), part, path_));
    sha_.Update(part);
    written_ += static_cast<int64_t>(part.size());
    bytes.remove_prefix(part.size());
    PPFT_RETURN_IF_ERROR(Sync());
  }
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Sync() {
  if (written_ - started_ >= kStartBytes) {
    // Only so that the disk is busy while more is made; whether it could be done shows in fdatasync.
    sync_file_range(fd_.get(), started_, written_ - started_, SYNC_FILE_RANGE_WRITE);
    started_ = written_;
  }
  if (written_ - synced_ < kUnsyncedBytes) return absl::OkStatus();
  if (fdatasync(fd_.get()) != 0) return ErrnoStatus(errno, path_);
  synced_ = written_;
  return absl::OkStatus();
}

absl::StatusOr<std::string> SafetensorsWriter::Finish() {
  if (written_ != file_bytes_) return absl::InternalError(absl::StrCat(path_, ": ", file_bytes_ - written_, " bytes are missing"));
  if (fsync(fd_.get()) != 0) return ErrnoStatus(errno, path_);
  return sha_.HexDigest();
}

absl::StatusOr<std::map<std::string, std::string>> ParseSafetensorsIndex(absl::string_view text, absl::string_view source) {
  PPFT_ASSIGN_OR_RETURN(const json object, ParseStrictObject(text, source, 4));
  const auto map = object.find("weight_map");
  if (map == object.end() || !map->is_object()) return absl::InvalidArgumentError(absl::StrCat(source, ": weight_map is missing or not an object"));
  std::map<std::string, std::string> out;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string()) return absl::InvalidArgumentError(absl::StrCat(source, ": weight_map.", tensor, " must be a file name"));
    const std::string name = file.get<std::string>();
    if (name.empty() || name[0] == '.' || name.find('/') != std::string::npos || name.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(source, ": weight_map.", tensor, " = ", ShortJson(file), ": must be the name of a file in the same folder"));
    }
    out[tensor] = name;
  }
  return out;
}

std::string SafetensorsIndexText(const std::map<std::string, std::string>& file_of_tensor, int64_t total_bytes) {
  nlohmann::ordered_json index;
  index["metadata"] = {{"total_size", total_bytes}};
  index["weight_map"] = file_of_tensor;
  return index.dump(2) + "\n";
}

}  // namespace ppft::model
