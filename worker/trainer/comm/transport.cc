#include "worker/trainer/comm/transport.h"

#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace ppft::trainer {
namespace {
constexpr char kPeerPayload[] = "ppft/peer";
}

absl::Status WithPeer(absl::Status status, int peer) {
  if (!status.ok()) status.SetPayload(kPeerPayload, absl::Cord(absl::StrCat(peer)));
  return status;
}

int PeerOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kPeerPayload);
  int peer = -1;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &peer)) return -1;
  return peer;
}

}  // namespace ppft::trainer
