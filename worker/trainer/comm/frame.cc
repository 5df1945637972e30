#include "worker/trainer/comm/frame.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace ppft::trainer {
namespace {

template <typename T>
void Put(char** at, T value) {
  std::memcpy(*at, &value, sizeof(value));
  *at += sizeof(value);
}

template <typename T>
T Get(const char** at) {
  T value;
  std::memcpy(&value, *at, sizeof(value));
  *at += sizeof(value);
  return value;
}

uint32_t Fnv1a(const char* bytes, size_t size) {
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<uint8_t>(bytes[i])) * 16777619u;
  return hash;
}

std::string WithPrefix(absl::string_view body) {
  std::string out(kHelloPrefixBytes, '\0');
  char* at = out.data();
  Put<uint32_t>(&at, kHelloMagic);
  Put<uint32_t>(&at, static_cast<uint32_t>(body.size()));
  absl::StrAppend(&out, body);
  return out;
}

constexpr int kHelloFixedBytes = 24;

}  // namespace

std::array<char, kFrameHeaderBytes> EncodeFrameHeader(const FrameHeader& header) {
  std::array<char, kFrameHeaderBytes> bytes;
  char* at = bytes.data();
  Put<uint32_t>(&at, kFrameMagic);
  Put<uint8_t>(&at, static_cast<uint8_t>(header.kind));
  Put<uint8_t>(&at, static_cast<uint8_t>(header.channel));
  Put<uint16_t>(&at, 0);
  Put<int64_t>(&at, header.epoch);
  Put<int64_t>(&at, header.tag.pass);
  Put<int32_t>(&at, header.tag.stage);
  Put<int32_t>(&at, header.tag.microbatch);
  Put<int64_t>(&at, header.payload_bytes);
  Put<uint32_t>(&at, Fnv1a(bytes.data(), kFrameHeaderBytes - 4));
  return bytes;
}

absl::StatusOr<FrameHeader> DecodeFrameHeader(absl::string_view bytes, int64_t epoch, Channel channel, int64_t max_payload_bytes) {
  if (bytes.size() != kFrameHeaderBytes) return absl::DataLossError("a frame header of the wrong size");
  const char* at = bytes.data();
  if (Get<uint32_t>(&at) != kFrameMagic) return absl::DataLossError("a frame without the magic number");
  FrameHeader header;
  const auto kind = Get<uint8_t>(&at);
  header.kind = static_cast<FrameKind>(kind);
  header.channel = static_cast<Channel>(Get<uint8_t>(&at));
  Get<uint16_t>(&at);
  header.epoch = Get<int64_t>(&at);
  header.tag.pass = Get<int64_t>(&at);
  header.tag.stage = Get<int32_t>(&at);
  header.tag.microbatch = Get<int32_t>(&at);
  header.payload_bytes = Get<int64_t>(&at);
  if (Get<uint32_t>(&at) != Fnv1a(bytes.data(), kFrameHeaderBytes - 4)) return absl::DataLossError("a frame header with a wrong checksum");
  if (kind < static_cast<uint8_t>(FrameKind::kData) || kind > static_cast<uint8_t>(FrameKind::kBeat)) {
    return absl::DataLossError(absl::StrCat("a frame of unknown kind ", kind));
  }
  if (header.channel != channel) return absl::DataLossError("a frame of another channel");
  if (header.epoch != epoch) return absl::FailedPreconditionError(absl::StrCat("a frame of epoch ", header.epoch, " where ", epoch, " is current"));
  if (header.payload_bytes < 0 || header.payload_bytes > max_payload_bytes) {
    return absl::DataLossError(absl::StrCat("a frame of ", header.payload_bytes, " bytes where at most ", max_payload_bytes, " are allowed"));
  }
  return header;
}

std::string EncodeHello(const Hello& hello) {
  std::string body(kHelloFixedBytes, '\0');
  char* at = body.data();
  Put<uint32_t>(&at, kProtocolVersion);
  Put<int64_t>(&at, hello.epoch);
  Put<int32_t>(&at, hello.rank);
  Put<int32_t>(&at, hello.to_rank);
  Put<uint32_t>(&at, static_cast<uint32_t>(hello.channel));
  absl::StrAppend(&body, hello.job_id);
  return WithPrefix(body);
}

absl::StatusOr<int> DecodeHelloPrefix(absl::string_view prefix) {
  if (prefix.size() != kHelloPrefixBytes) return absl::DataLossError("a short greeting");
  const char* at = prefix.data();
  if (Get<uint32_t>(&at) != kHelloMagic) return absl::DataLossError("no greeting of a trainer");
  const auto size = Get<uint32_t>(&at);
  if (size > kMaxHelloBytes) return absl::DataLossError(absl::StrCat("a greeting of ", size, " bytes"));
  return static_cast<int>(size);
}

absl::StatusOr<Hello> DecodeHello(absl::string_view body) {
  if (body.size() < kHelloFixedBytes) return absl::DataLossError("a short greeting");
  const char* at = body.data();
  const auto version = Get<uint32_t>(&at);
  if (version != kProtocolVersion) return absl::FailedPreconditionError(absl::StrCat("protocol version ", version, " where ", kProtocolVersion, " is spoken"));
  Hello hello;
  hello.epoch = Get<int64_t>(&at);
  hello.rank = Get<int32_t>(&at);
  hello.to_rank = Get<int32_t>(&at);
  const auto channel = Get<uint32_t>(&at);
  if (channel >= kNumChannels) return absl::DataLossError(absl::StrCat("unknown channel ", channel));
  hello.channel = static_cast<Channel>(channel);
  hello.job_id = std::string(body.substr(kHelloFixedBytes));
  return hello;
}

std::string EncodeHelloReply(absl::string_view refusal) { return WithPrefix(refusal); }

}  // namespace ppft::trainer
