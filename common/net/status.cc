#include "common/net/status.h"

#include <google/protobuf/any.pb.h>
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>

#include <functional>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"

namespace ppft::net {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;
using google::protobuf::io::StringOutputStream;

constexpr char kErrorInfoUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";
constexpr char kBadRequestUrl[] = "type.googleapis.com/google.rpc.BadRequest";
constexpr char kDomain[] = "ppft";
constexpr absl::string_view kTypePrefix = "type.googleapis.com/";
// HTTP/2 trailers are limited (8 KiB by default): longer messages and details are cut rather than lost together with the code.
constexpr size_t kMaxMessage = 4000;
constexpr size_t kMaxDetails = 3000;

// The three messages of google.rpc are written by hand: generated copies of them would clash with those of other libraries in one process.
void WriteText(CodedOutputStream* out, int field, absl::string_view text) {
  out->WriteTag(WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED));
  out->WriteVarint32(static_cast<uint32_t>(text.size()));
  out->WriteRaw(text.data(), static_cast<int>(text.size()));
}

std::string Serialize(const std::function<void(CodedOutputStream*)>& write) {
  std::string bytes;
  {
    StringOutputStream stream(&bytes);
    CodedOutputStream out(&stream);
    write(&out);
  }
  return bytes;
}

// Calls `text` for each length-delimited field; other fields are skipped. False for damaged bytes.
bool ReadFields(const std::string& bytes, const std::function<void(int field, const std::string& value)>& text) {
  CodedInputStream in(reinterpret_cast<const uint8_t*>(bytes.data()), static_cast<int>(bytes.size()));
  while (const uint32_t tag = in.ReadTag()) {
    if (WireFormatLite::GetTagWireType(tag) == WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
      uint32_t size;
      std::string value;
      if (!in.ReadVarint32(&size) || !in.ReadString(&value, static_cast<int>(size))) return false;
      text(WireFormatLite::GetTagFieldNumber(tag), value);
    } else if (!WireFormatLite::SkipField(&in, tag)) {
      return false;
    }
  }
  return in.ConsumedEntireMessage();
}

std::string PairBytes(absl::string_view first, absl::string_view second) {
  return Serialize([&](CodedOutputStream* out) {
    WriteText(out, 1, first);
    WriteText(out, 2, second);
  });
}

bool ReadPair(const std::string& bytes, std::string* first, std::string* second) {
  return ReadFields(bytes, [&](int field, const std::string& value) {
    if (field == 1) *first = value;
    if (field == 2) *second = value;
  });
}

std::string Payload(const absl::Status& status, absl::string_view url) {
  const auto cord = status.GetPayload(url);
  return cord ? std::string(*cord) : std::string();
}

// At most `limit` bytes, not ending inside a UTF-8 character.
std::string Cut(absl::string_view text, size_t limit) {
  if (text.size() <= limit) return std::string(text);
  size_t end = limit;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return std::string(text.substr(0, end)) + " …";
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const std::string message = Cut(status.message(), kMaxMessage);
  std::string details = Serialize([&](CodedOutputStream* out) {
    out->WriteTag(WireFormatLite::MakeTag(1, WireFormatLite::WIRETYPE_VARINT));
    out->WriteVarint32(static_cast<uint32_t>(status.raw_code()));
  });
  bool any = false;
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    if (!absl::StartsWith(url, kTypePrefix) || details.size() + payload.size() > kMaxDetails) return;
    google::protobuf::Any detail;
    detail.set_type_url(std::string(url));
    detail.set_value(std::string(payload));
    details += Serialize([&](CodedOutputStream* out) { WriteText(out, 3, detail.SerializeAsString()); });
    any = true;
  });
  return grpc::Status(static_cast<grpc::StatusCode>(status.raw_code()), message, any ? details : std::string());
}

absl::Status StatusFromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status out(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  ReadFields(status.error_details(), [&](int field, const std::string& value) {
    google::protobuf::Any detail;
    if (field == 3 && detail.ParseFromString(value)) out.SetPayload(detail.type_url(), absl::Cord(detail.value()));
  });
  return out;
}

void SetErrorInfo(absl::Status* status, const ErrorInfo& info) {
  status->SetPayload(kErrorInfoUrl, absl::Cord(Serialize([&](CodedOutputStream* out) {
                       WriteText(out, 1, info.reason);
                       WriteText(out, 2, kDomain);
                       for (const auto& [key, value] : info.metadata) WriteText(out, 3, PairBytes(key, value));
                     })));
}

ErrorInfo GetErrorInfo(const absl::Status& status) {
  ErrorInfo info;
  ReadFields(Payload(status, kErrorInfoUrl), [&](int field, const std::string& value) {
    if (field == 1) info.reason = value;
    std::string key, text;
    if (field == 3 && ReadPair(value, &key, &text)) info.metadata[key] = text;
  });
  return info;
}

void SetFieldViolations(absl::Status* status, const std::vector<FieldViolation>& violations) {
  std::string bytes;
  for (const FieldViolation& violation : violations) {
    const std::string next = Serialize([&](CodedOutputStream* out) { WriteText(out, 1, PairBytes(violation.field, violation.description)); });
    if (bytes.size() + next.size() > kMaxDetails / 2) break;  // the message has them all in words
    bytes += next;
  }
  status->SetPayload(kBadRequestUrl, absl::Cord(bytes));
}

bool IsRetryable(const absl::Status& status) { return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) || absl::IsAborted(status); }

}  // namespace ppft::net
