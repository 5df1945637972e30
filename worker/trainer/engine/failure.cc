#include "worker/trainer/engine/failure.h"

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/trainer/comm/transport.h"

namespace ppft::trainer {
namespace {

constexpr char kCode[] = "ppft/reason-code";
constexpr char kOwner[] = "ppft/reason-owner";
constexpr char kRemedy[] = "ppft/reason-remedy";

std::string PayloadOf(const absl::Status& status, const char* url) {
  const auto payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : std::string();
}

absl::Status Corrupt(const absl::Status& status) {
  return WithReason(status, "CHECKPOINT_CORRUPT", "INFRASTRUCTURE", "look at the disks of the coordinator and of this worker");
}

bool IsBadFile(const absl::Status& status) { return absl::IsDataLoss(status) || absl::IsInvalidArgument(status); }

}  // namespace

absl::Status WithReason(absl::Status status, absl::string_view code, absl::string_view owner, absl::string_view remedy) {
  if (status.ok() || !PayloadOf(status, kCode).empty()) return status;
  status.SetPayload(kCode, absl::Cord(code));
  status.SetPayload(kOwner, absl::Cord(owner));
  status.SetPayload(kRemedy, absl::Cord(remedy));
  return status;
}

bool IsOutOfDeviceMemory(const absl::Status& status) {
  if (status.ok() || !PayloadOf(status, kCode).empty()) return false;
  return absl::IsResourceExhausted(status) || absl::StrContains(status.message(), "out of memory") || absl::StrContains(status.message(), "ALLOC_FAILED");
}

absl::Status BlameGpu(const absl::Status& status, absl::string_view gpu) {
  if (status.ok() || gpu.empty() || !PayloadOf(status, kCode).empty() || DescribeFailure(status, 0).code != "DEVICE_ERROR") return status;
  return WithReason(Annotate(status, gpu), "DEVICE_ERROR", "INFRASTRUCTURE",
                    absl::StrCat("look for lines with \"NVRM: Xid\" about ", gpu,
                                 " in the kernel log of the worker's host (dmesg, or journalctl -k) and at the worker's log; the job tries again by itself"));
}

absl::Status OpenedCheckpoint(const absl::Status& status) {
  if (IsBadFile(status)) return Corrupt(status);
  return WithReason(status, "INTERNAL", "INFRASTRUCTURE", "look at the worker's disk, its log and its limit of open files");
}

absl::Status ReadCheckpoint(const absl::Status& status) { return IsBadFile(status) || absl::IsNotFound(status) ? Corrupt(status) : status; }

FailureReport DescribeFailure(const absl::Status& status, int64_t step) {
  FailureReport report;
  report.message = std::string(status.message());
  report.step = step;
  report.peer = PeerOf(status);
  report.code = PayloadOf(status, kCode);
  report.owner = PayloadOf(status, kOwner);
  report.remedy = PayloadOf(status, kRemedy);
  if (!report.code.empty()) return report;
  if (report.peer >= 0) {
    report.code = "COMM_ERROR";
    report.owner = "INFRASTRUCTURE";
    report.remedy = "the job starts again from its newest checkpoint; look at the log of the rank that was not reachable";
  } else if (absl::IsResourceExhausted(status)) {
    report.code = "OUT_OF_DEVICE_MEMORY";
    report.owner = "USER";
    report.remedy = "lower training.micro_batch_size or data.sequence_len, set parallel.activation_checkpointing: full, or use more pipeline stages";
  } else if (absl::IsInvalidArgument(status)) {
    report.code = "SPEC_INVALID";
    report.owner = "USER";
    report.remedy = "correct the job and submit it again";
  } else {
    report.code = "DEVICE_ERROR";
    report.owner = "INFRASTRUCTURE";
    report.remedy = "look at the worker's log";
  }
  return report;
}

}  // namespace ppft::trainer
