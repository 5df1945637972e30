// The bytes of the TCP transport, little-endian. A connection carries one channel between two ranks: Hello from the dialling side, HelloReply, then frames
// both ways. Headers carry a checksum, so that a damaged length is refused and never allocated. PURE.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/trainer/comm/transport.h"

namespace ppft::trainer {

inline constexpr uint32_t kFrameMagic = 0x46545050;  // "PPTF"
inline constexpr uint32_t kHelloMagic = 0x48545050;  // "PPTH"
inline constexpr uint32_t kProtocolVersion = 1;

// kAbort: the sender gives up; tag.stage is the rank that it lost, or its own. kBeat: the sender lives.
enum class FrameKind : uint8_t { kData = 1, kGoodbye = 2, kAbort = 3, kBeat = 4 };

struct FrameHeader {
  FrameKind kind = FrameKind::kData;
  Channel channel = Channel::kControl;
  int64_t epoch = 0;
  Tag tag;
  int64_t payload_bytes = 0;
};
inline constexpr int kFrameHeaderBytes = 44;

std::array<char, kFrameHeaderBytes> EncodeFrameHeader(const FrameHeader& header);
// DATA_LOSS for a wrong magic, checksum, kind, channel, or more than max_payload_bytes; FAILED_PRECONDITION for another epoch.
absl::StatusOr<FrameHeader> DecodeFrameHeader(absl::string_view bytes, int64_t epoch, Channel channel, int64_t max_payload_bytes);

struct Hello {
  std::string job_id;
  int64_t epoch = 0;
  int32_t rank = 0;     // of the dialling side
  int32_t to_rank = 0;  // whom it wants
  Channel channel = Channel::kControl;
};
inline constexpr int kHelloPrefixBytes = 8;  // magic, length of what follows
inline constexpr int kMaxHelloBytes = 4096;

// Prefix and body.
std::string EncodeHello(const Hello& hello);
// The body's length. DATA_LOSS for a wrong magic or a length above kMaxHelloBytes.
absl::StatusOr<int> DecodeHelloPrefix(absl::string_view prefix);
absl::StatusOr<Hello> DecodeHello(absl::string_view body);

// The answer has the same prefix; an empty body means welcome, otherwise it is the reason of the refusal.
std::string EncodeHelloReply(absl::string_view refusal);

}  // namespace ppft::trainer
